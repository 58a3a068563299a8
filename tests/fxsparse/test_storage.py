"""Storage of a training weight: both forms answer alike, and compact storage keeps to its capacity."""

import copy
import dataclasses
import pickle
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxsparse
from fxsparse import Plan, optimizer_state
from fxsparse.errors import CheckpointError, InvariantError, PatternError, UnsupportedError
from fxsparse.method import Probe
from fxsparse.methods import rigl, srigl
from fxsparse.selection import MaskChange, to_mask
from fxsparse.storage import CompactWeight, MaskedWeight

SHAPE = (5, 6)
BUFFERS = ("indices", "crow", "ccol", "rows_t", "perm")


def positions(entries):
    return torch.tensor(sorted(entries), dtype=torch.int64)


def compact(entries=(1, 4, 9, 20), capacity=None):
    flat = positions(entries)
    return CompactWeight(SHAPE, flat, flat + 0.5, capacity)


def stepped(parameter):
    """An optimizer whose state of `parameter` is nowhere 0, as if unused slots had been trained too."""
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def states(optimizer, parameter):
    return list(optimizer_state.per_element(optimizer, parameter))


def test_unused_slots_follow_the_entries():
    weight = compact(capacity=6)
    assert weight.values.tolist() == [1.5, 4.5, 9.5, 20.5, 0, 0]
    assert weight.indices.tolist() == [[0, 0, 1, 3, -1, -1], [1, 4, 3, 2, -1, -1]]
    assert weight.active().tolist() == [1, 4, 9, 20]
    assert weight.values_at(weight.active()).tolist() == [1.5, 4.5, 9.5, 20.5]
    assert weight.dense().flatten().nonzero().flatten().tolist() == [1, 4, 9, 20]
    assert str(weight) == "CompactWeight(5x6, nnz=4, capacity=6)"


def test_a_convolution_keeps_no_transposed_index_through_moves_loads_and_copies():
    flat = positions((1, 4, 9, 40))
    weight = CompactWeight((4, 3, 2, 2), flat, flat + 0.5, 5)
    weight.move(MaskChange.between(flat, positions((1, 9, 17, 20, 47))), None)
    weight.indices.copy_(weight.indices.clone())
    weight.reindex()
    weight = copy.deepcopy(weight)
    assert [weight.rows_t.numel(), weight.perm.numel(), weight.index.capacity] == [0, 0, 5]
    assert weight.active().tolist() == [1, 9, 17, 20, 47]
    assert weight.values.tolist() == [1.5, 9.5, 0, 0, 0]
    assert weight.crow.tolist() == [0, 2, 4, 4, 5]
    assert weight.dense().shape == (4, 3, 2, 2)


def test_the_capacity_is_nnz_unless_given_and_never_less():
    assert compact().values.shape == (4,)
    assert compact((), capacity=3).active().tolist() == []
    with pytest.raises(PatternError, match="room for 3 entries, got 4"):
        compact(capacity=3)


sets = st.sets(st.integers(0, 29), max_size=20)


@given(sets, st.lists(sets, min_size=1, max_size=3))
def test_compact_storage_moves_like_masked_storage_at_any_nnz(start, moves):
    flat = positions(start)
    dense = torch.zeros(30)
    dense[flat] = flat + 0.5
    masked = MaskedWeight(nn.Parameter(dense.reshape(SHAPE)), to_mask(flat, SHAPE))
    weight = compact(start, capacity=20)
    addresses = [getattr(weight, name).data_ptr() for name in BUFFERS]
    optimizers = stepped(masked.parameter), stepped(weight.values)
    masked.parameter.data.mul_(masked.mask)
    weight.zero_unused()
    for state in states(optimizers[0], masked.parameter):
        state.mul_(masked.mask)
    for move in moves:
        change = MaskChange.between(weight.active(), positions(move))
        masked.move(change, optimizers[0], exact_zeros=True)
        weight.move(change, optimizers[1])
        active = weight.active()
        assert active.tolist() == masked.active().tolist() == sorted(move)
        assert torch.equal(weight.dense(), masked.parameter)
        assert not weight.values[len(move) :].any()
        for state, whole in zip(
            states(optimizers[1], weight.values), states(optimizers[0], masked.parameter), strict=True
        ):
            assert torch.equal(state[: len(move)], whole.flatten()[active])
            assert not state[len(move) :].any()
    assert addresses == [getattr(weight, name).data_ptr() for name in BUFFERS]


def test_a_move_that_cannot_be_made_changes_nothing():
    weight = compact(capacity=4)
    change = MaskChange.between(weight.active(), positions(range(5)))
    with pytest.raises(PatternError, match="room for 4 entries, got 5"):
        weight.move(change, None)
    factored = torch.optim.SGD([weight.values], lr=0.1)
    factored.state[weight.values]["row"] = torch.ones(2)
    with pytest.raises(UnsupportedError, match="SGD keeps 'row'"):
        weight.move(MaskChange.between(weight.active(), positions([2])), factored)
    assert weight.active().tolist() == [1, 4, 9, 20]
    assert weight.values.tolist() == [1.5, 4.5, 9.5, 20.5]


def test_reindex_follows_indices_that_were_loaded():
    weight, other = compact(capacity=6), compact((0, 7), capacity=6)
    weight.load_state_dict(other.state_dict())
    weight.reindex()
    for name in BUFFERS:
        assert torch.equal(getattr(weight, name), getattr(other, name))
    assert torch.equal(weight.dense(), other.dense())


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))], ids=["deep", "pickle"]
)
def test_a_copy_has_the_same_capacity_and_moves_alone(again):
    weight = compact(capacity=6)
    twin = again(weight)
    twin.move(MaskChange.between(twin.active(), positions(range(6))), None)
    assert twin.active().tolist() == list(range(6))
    assert twin.values.tolist() == [0, 1.5, 0, 0, 4.5, 0]
    assert weight.active().tolist() == [1, 4, 9, 20]


@dataclasses.dataclass(frozen=True)
class Breathing:
    """Moves to random entries, and to another number of them each time: all of the budget, a half, none."""

    probe: ClassVar[Probe] = Probe.DENSE

    def __call__(self, view):
        nnz = int(view.budget * (1.0, 0.5, 0.0, 0.9)[view.step // 2 % 4])
        gradient = torch.cat([tile for _, tile in view.gradient_tiles()]).flatten()
        score = torch.rand(gradient.shape, generator=view.generator) + (gradient != 0)
        return score.topk(nnz).indices.sort().values


METHOD = dataclasses.replace(rigl(every=2, stop=1000, variant="torch"), rule=Breathing(), varying_nnz=True)
FULL = [102, 26]  # 0.2 of 16 x 32 and of 32 x 4


def compiled(storage="compact", method=METHOD, dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)
    return fxsparse.compile(net, Plan(sparsity=0.8, allocation="uniform", storage=storage, method=method))


def train(sparse, steps, call=None, first=0, optimizer=None):
    """Losses and counts of entries."""
    optimizer = optimizer or torch.optim.AdamW(sparse.parameters(), lr=0.01, weight_decay=0.1)
    sparse.attach(optimizer)
    losses, counts = [], []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        x = x.to(next(sparse.parameters()).dtype)
        loss = (sparse if call is None else call)(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        counts.append([len(weight.active()) for _, weight in sparse.weights()])
    return losses, counts, optimizer


def test_varying_nnz_trains_alike_in_both_storages():
    sparse, masked = compiled(), compiled("masked")
    losses, counts, _ = train(sparse, 12)
    expected, expected_counts, _ = train(masked, 12)
    assert counts == expected_counts
    assert counts[1:9:2] == [[51, 13], [0, 0], [91, 23], FULL]
    torch.testing.assert_close(losses, expected)
    for name, mask in masked.masks().items():
        assert torch.equal(sparse.masks()[name], mask)
        assert torch.equal(sparse.coordinates()[name][1], mask.nonzero()[:, 1])
        torch.testing.assert_close(sparse.dense_state_dict()[name], masked.dense_state_dict()[name])
        torch.testing.assert_close(sparse.to_dense().get_parameter(name), masked.get_parameter(name))
    assert sparse.sparsity() == masked.sparsity()
    for (_, weight), full in zip(sparse.weights(), FULL, strict=True):
        assert weight.values.shape == (full,)


def test_srigl_ablates_alike_in_both_storages():
    method = srigl(every=2, stop=1000, gamma_sal=0.9)
    runs = [compiled(storage, method, torch.float64) for storage in ("compact", "masked")]
    (losses, counts, _), (expected, expected_counts, _) = (train(sparse, 30) for sparse in runs)
    assert counts == expected_counts
    assert len({first for first, _ in counts}) > 1
    torch.testing.assert_close(losses, expected)
    assert torch.equal(runs[0].masks()["0.weight"], runs[1].masks()["0.weight"])
    assert not runs[0].masks()["0.weight"].any(1).all()


def test_bytes_in_the_report_count_the_capacity():
    sparse = compiled()
    slots, pointers = sum(FULL), 33 + 17 + 5 + 33
    assert sparse.report.totals["bytes_sparse"] == 4 * (slots * (1 + 2 + 1 + 1) + pointers)


def test_an_optimizer_from_before_compiling_moves_to_the_capacity():
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    net(torch.randn(8, 16)).sum().backward()
    optimizer.step()
    plan = Plan(sparsity=0.8, storage="compact", method=METHOD)
    sparse = fxsparse.compile(net, plan, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in sparse.parameters()}
    for parameter in sparse.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    before = [parameter.detach().clone() for parameter in sparse.parameters()]
    train(sparse, 6, optimizer=optimizer)
    assert not any(torch.equal(p, b) for p, b in zip(sparse.parameters(), before, strict=True))


def test_varying_nnz_compiles_two_frames():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    sparse = compiled()
    losses, counts, _ = train(sparse, 20, torch.compile(sparse, backend=counter, fullgraph=True))
    expected, expected_counts, _ = train(compiled(), 20)
    assert counter.frame_count <= 2
    assert counts == expected_counts
    torch.testing.assert_close(losses, expected)


def reloaded(sparse):
    other = compiled()
    other.load_state_dict(sparse.state_dict())
    return other


@pytest.mark.parametrize("steps", [3, 4, 5, 7])
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), reloaded],
    ids=["deepcopy", "pickle", "state_dict"],
)
def test_training_goes_on_alike_after_a_copy_with_unused_slots(again, steps):
    sparse = compiled()
    optimizer = train(sparse, steps)[2]
    twin = again(sparse)
    resumed = torch.optim.AdamW(twin.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = train(sparse, 6, first=steps, optimizer=optimizer)[:2]
    assert train(twin, 6, first=steps, optimizer=resumed)[:2] == expected
    for key, value in sparse.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


def test_a_dense_checkpoint_loads_into_unused_slots_as_zero():
    sparse = compiled()
    train(sparse, 3)
    dense = {key: torch.ones_like(value) for key, value in sparse.dense_state_dict().items()}
    sparse.load_state_dict(dense)
    assert torch.equal(sparse.dense_state_dict()["0.weight"], sparse.masks()["0.weight"].float())
    assert sparse.get_parameter("0.weight.values").tolist() == [1.0] * 51 + [0.0] * 51


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ((slice(None), 60), 0, "-1 in every slot after the last entry"),
        ((1, 60), -2, "-1 in every slot after the last entry"),
        ((0, 50), 32, "inside the 32 x 16 weight"),
        ((1, 0), -1, "inside the 32 x 16 weight"),
        ((slice(None), 1), 0, "strictly ascending"),
    ],
)
def test_broken_indices_are_checkpoint_errors_and_nothing_is_loaded(at, value, message):
    sparse = compiled()
    train(sparse, 3)
    state = copy.deepcopy(sparse.state_dict())
    before = copy.deepcopy(state)
    state["0.weight.indices"][at] = value
    with pytest.raises(CheckpointError, match=rf"(?s)0.weight.indices.*{message}"):
        sparse.load_state_dict(
            {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        )
    for key, tensor in before.items():
        assert torch.equal(tensor, sparse.state_dict()[key]), key


def test_a_count_that_the_method_cannot_have_is_refused():
    state = compiled().state_dict()
    state["0.weight.indices"][:, 50:] = -1
    compiled().load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"0.weight.indices: expected 102 active entries, .* got 50"):
        compiled(method=rigl(every=2)).load_state_dict(state)
    constant = compiled(method=dataclasses.replace(METHOD, varying_nnz=False))
    with pytest.raises(
        InvariantError, match=r"chose 51 entries at step 2, expected 102\. .*varying_nnz=True"
    ):
        train(constant, 2)


class Noise(torch.optim.Optimizer):
    """Changes every number that it holds."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=group["lr"])


def test_unused_slots_stay_zero_whatever_the_optimizer_does():
    sparse = compiled()
    train(sparse, 3, optimizer=Noise(sparse.parameters()))
    for _, weight in sparse.weights():
        nnz = weight.index.nnz
        assert 0 < nnz < len(weight.values)
        assert weight.values[:nnz].all()
        assert not weight.values[nnz:].any()
