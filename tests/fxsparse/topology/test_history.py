"""The record of updates: a table by hand, dense masks as the oracle, and what survives copies and checkpoints."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import CheckpointError
from fxsparse.methods import gmp, gse, rigl, set_, sr_ste, srigl, static
from fxsparse.pattern import NM
from fxsparse.selection import MaskChange, to_positions
from fxsparse.topology import TopologyHistory, history

MASKS = [
    [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
    [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]],  # one pruned, one grown
    [[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]],  # the first entry again, and a neuron goes
]
BY_HAND = [
    # step, updates, nnz, active neurons, fan-in least, mean and largest, pruned, grown, churn, itop
    (0, 0, 3, 2, 1, 1.5, 2, 0, 0, None, 3 / 12),
    (5, 1, 3, 2, 1, 1.5, 2, 1, 1, 1 / 3, 4 / 12),
    (9, 1, 3, 1, 3, 3.0, 3, 1, 1, 1 / 3, 4 / 12),
]
COLUMNS = (
    *("step", "updates", "nnz", "active_neurons", "fan_in_min", "fan_in_mean", "fan_in_max"),
    *("pruned", "grown", "churn", "itop"),
)


def record(seen, step, before, after, kind="positions", name="w"):
    if kind == "masks":
        seen.record_masks(name, step, before, after)
        return
    old, new = to_positions(before), to_positions(after)
    seen.record(name, step, old, MaskChange.between(old, new))


def by_hand(kind="positions"):
    masks = [torch.tensor(mask).bool() for mask in MASKS]
    seen = TopologyHistory({"w": (3, 4)})
    seen.track_itop(0)
    for step, (before, after) in zip((5, 9), itertools.pairwise(masks), strict=True):
        record(seen, step, before, after, kind)
    return seen


@pytest.mark.parametrize("kind", ["positions", "masks"])
def test_rows_are_those_worked_out_by_hand(kind):
    rows = by_hand(kind).rows()
    assert [tuple(row[column] for column in COLUMNS) for row in rows] == BY_HAND
    assert {(row["name"], row["numel"], row["neurons"], row["itop_since"]) for row in rows} == {
        ("w", 12, 3, 0)
    }


def test_an_empty_mask_has_no_fan_in_and_no_churn():
    seen = TopologyHistory({"w": (2, 2)})
    record(seen, 1, torch.eye(2).bool(), torch.zeros(2, 2).bool())
    last = seen.latest()[0]
    assert (last["nnz"], last["active_neurons"], last["fan_in_max"]) == (0, 0, 0)
    assert (last["fan_in_mean"], last["churn"], last["pruned"]) == (None, None, 2)


def test_itop_counts_from_where_it_was_asked_for():
    seen = TopologyHistory({"w": (3, 4)})
    masks = [torch.tensor(mask).bool() for mask in MASKS]
    record(seen, 5, masks[0], masks[1])
    seen.track_itop(7)
    seen.track_itop(8)
    record(seen, 9, masks[1], masks[2])
    assert [(row["itop"], row["itop_since"]) for row in seen.rows()] == [
        (None, None),
        (None, None),
        (4 / 12, 7),
    ]


def test_many_updates_are_summed_up_in_pairs(monkeypatch):
    monkeypatch.setattr(history, "MAX_ROWS", 5)
    seen, masks = TopologyHistory({"w": (3, 4)}), [torch.tensor(mask).bool() for mask in MASKS[:2]]
    for step in range(1, 12):
        record(seen, step, masks[(step - 1) % 2], masks[step % 2])
    rows = seen.rows()
    assert [(row["step"], row["updates"], row["grown"]) for row in rows] == [
        (0, 0, 0),
        (4, 4, 4),
        (8, 4, 4),
        (11, 3, 3),
    ]
    assert all(row["churn"] == 1 / 3 for row in rows[1:])


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def compiled(method, storage="masked", pattern=None, **options):
    plan = Plan(sparsity=None if pattern else 0.7, method=method, storage=storage, pattern=pattern, **options)
    return fxsparse.compile(net(), plan)


def train(sparse, steps, first=0, optimizer=None):
    """Masks before the first step and after each."""
    optimizer = optimizer or torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    sparse.attach(optimizer)
    seen = [sparse.masks()]
    for step in range(first, first + steps):
        x = torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse(x), x.flatten(1)[:, :4].argmax(1)).backward()
        optimizer.step()
        seen.append(sparse.masks())
    return seen


def expected(masks, moments):
    """The rows that dense masks give, with a dense bool mask of what was visited."""
    for name in masks[0]:
        visited, before = masks[0][name].clone(), masks[0][name]
        for step, taken in moments:
            mask = masks[taken][name]
            visited |= mask
            fan_in = mask.flatten(1).sum(1)
            yield {
                "name": name,
                "step": step,
                "nnz": int(mask.sum()),
                "active_neurons": int((fan_in > 0).sum()),
                "fan_in_min": int(fan_in[fan_in > 0].min()),
                "fan_in_max": int(fan_in.max()),
                "pruned": int((before & ~mask).sum()),
                "grown": int((mask & ~before).sum()),
                "itop": float(visited.sum()) / mask.numel(),
            }
            before = mask


def moving(build, **options):
    return build(every=2, stop=100, drop_fraction=0.5, decay="constant", **options)


METHODS = {
    "rigl": (
        moving(rigl),
        None,
    ),  # takes the place of the optimizer's step: its updates are at steps 0, 2, ...
    "rigl-torch": (moving(rigl, variant="torch"), None),
    "set": (moving(set_), None),
    "srigl": (moving(srigl, gamma_sal=0.9), None),
    "gse": (moving(gse), None),
    "gse-global": (moving(gse, scope="global"), None),
    "gmp": (gmp(start=2, stop=8, every=2), None),
    "sr-ste": (sr_ste(), NM(1, 2)),
}


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        *((name, "masked") for name in METHODS),
        *((name, "compact") for name in ("rigl", "set", "srigl", "gse", "gse-global")),
    ],
)
def test_equals_what_dense_masks_say(name, storage):
    method, pattern = METHODS[name]
    sparse = compiled(method, storage, pattern)
    sparse.track_itop()
    masks = train(sparse, 9)
    rows = [row for row in sparse.report.topology.rows() if row["updates"]]
    late = 1 if method.schedule.skip_step else 0  # an update of step n shows once n + 1 steps were counted
    steps = [
        step for step in range(11) if method.schedule.fires(step) and step + late <= 9 and step + late > 0
    ]
    oracle = list(expected(masks, [(step, step + late) for step in steps]))
    assert len(oracle) == 3 * len(steps)
    assert [{key: row[key] for key in oracle[0]} for row in rows] == oracle
    assert any(row["grown"] or row["pruned"] for row in rows)


@pytest.mark.parametrize(("method", "pattern"), [(moving(set_), None), (sr_ste(), NM(1, 2))])
def test_a_weight_stored_in_by_out_is_counted_by_its_neurons(method, pattern):
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(64, 24), Conv1D(10, 24), nn.Linear(10, 4))
    plan = Plan(sparsity=None if pattern else 0.7, method=method, pattern=pattern, storage="masked")
    sparse = fxsparse.compile(nn.Sequential(nn.Flatten(), model), plan)
    masks = [{"1.1.weight": mask["1.1.weight"].t()} for mask in train(sparse, 4)]
    steps = [step for step in range(1, 5) if method.schedule.fires(step)]
    rows = [row for row in sparse.report.topology.rows() if row["name"] == "1.1.weight" and row["updates"]]
    oracle = list(expected(masks, [(step, step) for step in steps]))
    keys = [key for key in oracle[0] if key != "itop"]
    assert [[row[key] for key in keys] for row in rows] == [[row[key] for key in keys] for row in oracle]
    assert rows[0]["neurons"] == 10


def test_static_masks_and_frozen_weights_have_no_rows():
    sparse = compiled(static())
    train(sparse, 3)
    assert sparse.report.topology.rows() == []
    sparse = compiled(moving(rigl))
    sparse.get_parameter("3.weight").requires_grad_(False)
    train(sparse, 5)
    assert {row["name"] for row in sparse.report.topology.rows()} == {"0.weight", "5.weight"}


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sparse: pickle.loads(pickle.dumps(sparse))])
def test_a_copy_has_the_history_and_continues_it_alone(copied, storage):
    sparse = compiled(moving(rigl), storage)
    sparse.track_itop()
    train(sparse, 5)
    other = copied(sparse)
    before = sparse.report.topology.rows()
    assert other.report.topology.rows() == before
    train(other, 5, first=5)
    assert sparse.report.topology.rows() == before
    assert len(other.report.topology.rows()) > len(before)
    train(sparse, 5, first=5)
    assert sparse.report.topology.rows() == other.report.topology.rows()


def checkpoint(sparse):
    saved = io.BytesIO()
    torch.save({"model": sparse.state_dict(), "topology": sparse.report.topology.state_dict()}, saved)
    saved.seek(0)
    return torch.load(saved, weights_only=True)


def test_a_checkpoint_continues_it_and_without_one_it_says_since_when():
    sparse = compiled(moving(set_))
    sparse.track_itop()
    train(sparse, 5)
    saved = checkpoint(sparse)
    train(sparse, 4, first=5)
    resumed, bare = compiled(moving(set_)), compiled(moving(set_))
    resumed.load_state_dict(saved["model"])
    resumed.report.topology.load_state_dict(saved["topology"])
    bare.track_itop()
    bare.load_state_dict(saved["model"])
    assert (bare.report.topology.since, bare.report.topology.itop_since) == (5, 5)
    masks = train(bare, 4, first=5)
    train(resumed, 4, first=5)
    assert resumed.report.topology.rows() == sparse.report.topology.rows()
    first = bare.report.topology.rows()[0]
    assert (first["step"], first["updates"], first["itop_since"]) == (5, 0, 5)
    assert first["itop"] == int(masks[0]["0.weight"].sum()) / first["numel"]


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_saved_file_brings_it_back(storage, tmp_path):
    sparse = compiled(moving(srigl), storage)
    sparse.track_itop()
    train(sparse, 5)
    fxsparse.save(sparse, tmp_path / "run.safetensors")
    loaded = fxsparse.load(tmp_path / "run.safetensors", net())
    assert loaded.report.topology.rows() == sparse.report.topology.rows()
    train(sparse, 4, first=5)
    train(loaded, 4, first=5)
    assert loaded.report.topology.rows() == sparse.report.topology.rows()


def test_a_history_of_another_model_is_refused():
    with pytest.raises(
        CheckpointError, match=r"a sparse weight 'w' of shape \[3, 4\], got none of that name"
    ):
        TopologyHistory({"v": (3, 4)}).load_state_dict(by_hand().state_dict())
    with pytest.raises(CheckpointError, match=r"got \(4, 3\)"):
        TopologyHistory({"w": (4, 3)}).load_state_dict(by_hand().state_dict())
