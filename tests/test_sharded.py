"""fully_shard (FSDP2): a run in shards equals one in one piece, and its checkpoints open on any number of ranks."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fxsparse
from fxsparse import Plan, sharding
from fxsparse.errors import PlanError, UnsupportedError
from fxsparse.methods import gse, rigl, set_, spartan, srigl
from tests import ranks

MOVING = {"every": 2, "stop": 1_000, "drop_fraction": 0.4, "decay": "constant"}
METHODS = {
    "rigl": rigl(**MOVING),
    "srigl": srigl(**MOVING, gamma_sal=0.95),
    "gse": gse(every=2, stop=1_000),
    "set": set_(**MOVING),
    "spartan": spartan(steps=12),
}
CASES = [(name, s) for name in METHODS for s in ("masked", "compact") if (name, s) != ("spartan", "compact")]
STEPS, SAVED, KILLED = 10, 6, 8


def build(method, storage):
    """In fp64, and of sizes that 4 ranks do not share evenly: 30 rows go as 8, 8, 8, 6."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 10)).double()
    model = model.eval()  # frozen statistics: those of a part of the batch are others
    return fxsparse.compile(model, Plan(sparsity=0.7, storage=storage, method=method))


def made(name, storage, shard, mesh=None):
    sparse = build(METHODS[name], storage)
    if shard:
        fully_shard(sparse, mesh=mesh)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer)
    return sparse, optimizer


def train(sparse, optimizer, steps, rank=0, world=1):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(24, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        sparse(x[rank::world]).square().mean().backward()
        optimizer.step()


def whole(sparse):
    sparse.verify_sync()
    dense = {name: value.clone() for name, value in sparse.to_dense().state_dict().items()}
    step = {"step": sparse.state_dict()["fxsparse_step"]}
    return {"masks": sparse.masks(), "weights": sparse.dense_state_dict(), "dense": dense, "step": step}


def save(sparse, optimizer, path):
    model, state = get_state_dict(sparse, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=path)


def resume(sparse, optimizer, path):
    model, state = get_state_dict(sparse, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=path)
    set_state_dict(sparse, optimizer, model_state_dict=model, optim_state_dict=state)


def two(rank, world, folder):
    """Train every case on two ranks, save in between, and note the end."""
    shown = {}
    for name, storage in CASES:
        sparse, optimizer = made(name, storage, shard=True)
        train(sparse, optimizer, range(SAVED), rank, world)
        save(sparse, optimizer, folder / f"{name}-{storage}")
        train(sparse, optimizer, range(SAVED, STEPS), rank, world)
        shown[name, storage] = whole(sparse)
        parameters = dict(sparse.named_parameters())
        assert all(p.to_local().numel() <= p.numel() // 2 + p.shape[-1] for p in parameters.values())
        with torch.no_grad():  # leaves whole weights behind: what is read next has to let go of them
            sparse(torch.ones(2, 16, dtype=torch.float64))
        assert_same(whole(sparse), shown[name, storage], exact=True)
    shown["refusals"] = refusals()
    torch.save(shown, folder / f"two{rank}.pt")


def one(rank, world, folder):
    """Go on in one process from the checkpoint of two."""
    torch.save({case: gone_on(*case, rank, world, folder)[1] for case in CASES}, folder / f"one{rank}.pt")


def gone_on(name, storage, rank, world, folder):
    sparse, optimizer = made(name, storage, shard=world > 1)
    resume(sparse, optimizer, folder / f"{name}-{storage}")
    train(sparse, optimizer, range(SAVED, STEPS), rank, world)
    return sparse, whole(sparse)


def four(rank, world, folder):
    """The same on four ranks; load a dense state dict, and look at what each rank holds."""
    shown = {}
    for name, storage in CASES:
        sparse, shown[name, storage] = gone_on(name, storage, rank, world, folder)
        if name != "spartan":  # its soft masks are no part of a dense state dict
            sparse.load_state_dict({key: torch.ones_like(v) for key, v in sparse.dense_state_dict().items()})
            ones = sparse.dense_state_dict()
            assert all(torch.equal(ones[key], mask.double()) for key, mask in sparse.masks().items())
    replicas = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for storage in ("masked", "compact"):
        sparse, optimizer = made("rigl", storage, True, replicas)
        train(sparse, optimizer, range(STEPS), rank, world)
        assert_same(whole(sparse), shown["rigl", storage])
    weight = fully_shard(nn.Linear(16, 30)).weight
    rows = torch.arange(30)[:, None].expand(30, 16)
    expected = {0: (0, 8), 1: (8, 8), 2: (16, 8), 3: (24, 6)}[rank]
    assert sharding.part(weight, rows)[:, 0].tolist() == list(range(expected[0], sum(expected)))
    inside = sharding.entries(weight, (torch.tensor([0, 9, 25]), torch.tensor([1, 2, 3])))
    assert [axis.tolist() for axis in inside] == {0: [[0], [1]], 1: [[1], [2]], 2: [[], []], 3: [[1], [3]]}[
        rank
    ]
    assert torch.equal(sharding.shard_like(weight, sharding.whole(weight)).to_local(), weight.to_local())
    torch.save(shown, folder / f"four{rank}.pt")


def refusals():
    """What cannot be done in shards says so."""
    said = {}
    nested = build(METHODS["rigl"], "masked")
    fully_shard(nested.get_submodule("0"))
    fully_shard(nested)
    with pytest.raises(UnsupportedError) as caught:
        nested(torch.ones(2, 16, dtype=torch.float64))
    said["nested"] = str(caught.value)
    with pytest.raises(PlanError) as caught:
        fxsparse.compile(fully_shard(nn.Sequential(nn.Linear(8, 8))), Plan(sparsity=0.5))
    said["sharded first"] = str(caught.value)
    sparse, optimizer = made("rigl", "masked", shard=True)
    with pytest.raises(UnsupportedError) as caught:
        fxsparse.save(sparse, "nowhere.safetensors", optimizer=optimizer)
    said["save"] = str(caught.value)
    flat = build(METHODS["rigl"], "masked")
    wrapped = FullyShardedDataParallel(flat, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedError) as caught:
        flat.attach(torch.optim.SGD(wrapped.parameters(), lr=0.1))
    said["flat"] = str(caught.value)
    early = build(METHODS["set"], "masked")
    optimizer = torch.optim.SGD(early.parameters(), lr=0.1)
    early.attach(optimizer)
    fully_shard(early)
    with pytest.raises(PlanError) as caught:
        train(early, optimizer, range(2))
    said["stale optimizer"] = str(caught.value)
    return said


def assert_same(found, expected, exact=False):
    for kind, tensors in expected.items():
        for key, value in tensors.items():
            got = found[kind][key]
            close = torch.equal if exact or kind == "masks" else torch.allclose
            assert close(got, value), (kind, key)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    ranks.start(two, 2, folder)
    ranks.start(four, 4, folder)
    ranks.start(one, 1, folder)
    return {
        (name, rank): torch.load(folder / f"{name}{rank}.pt", weights_only=True)
        for name, world in (("two", 2), ("four", 4), ("one", 1))
        for rank in range(world)
    }


@pytest.mark.parametrize(("name", "storage"), CASES)
def test_shards_train_as_one_piece_and_go_on_from_a_checkpoint_of_other_ranks(name, storage, shown):
    sparse, optimizer = made(name, storage, shard=False)
    first = sparse.masks()
    train(sparse, optimizer, range(STEPS))
    expected = whole(sparse)
    assert any(not torch.equal(mask, first[key]) for key, mask in expected["masks"].items())
    for part in shown.values():
        assert_same(part[name, storage], expected)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nested", "'0' is sharded by itself: expected fully_shard(sparse) on the compiled module alone"),
        ("sharded first", "'0.weight' is sharded (a DTensor): expected a model in one piece"),
        ("flat", "which FullyShardedDataParallel flattens"),
        ("save", "save: the module is sharded"),
        ("stale optimizer", "the optimizer does not hold '0.weight' as it is stored now"),
    ],
)
def test_what_shards_cannot_do_is_refused_with_the_way(what, message, shown):
    for rank in range(2):
        assert message in shown["two", rank]["refusals"][what]


def test_a_step_that_only_makes_an_optimizer_s_state_does_not_count_and_one_at_lr_0_does():
    sparse = build(set_(**{**MOVING, "every": 1}), "masked")
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.0)
    sparse.attach(optimizer)
    before = sparse.masks()
    state = get_state_dict(sparse, optimizer)[1]
    assert state["state"]  # made by a step
    assert int(sparse.state_dict()["fxsparse_step"]) == 0
    assert all(torch.equal(mask, before[name]) for name, mask in sparse.masks().items())
    train(sparse, optimizer, range(1))
    assert int(sparse.state_dict()["fxsparse_step"]) == 1
    fresh = build(set_(**{**MOVING, "every": 1}), "masked")
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.0)
    fresh.attach(optimizer)
    train(fresh, optimizer, range(1))  # a warm-up may begin at 0, before there is any state
    assert int(fresh.state_dict()["fxsparse_step"]) == 1
