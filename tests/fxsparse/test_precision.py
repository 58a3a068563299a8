"""Mixed precision, recomputation, accumulation, averages and optimizers, each in both storages."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fxsparse
from fxsparse import Plan
from fxsparse.errors import CheckpointError, PlanError, UnsupportedError
from fxsparse.methods import rigl, set_

pytestmark = pytest.mark.parametrize("storage", ["masked", "compact"])
STEPS = 9
RIGL = rigl(every=2, stop=1_000, drop_fraction=0.4, decay="constant")
RIGL_TORCH = rigl(every=2, stop=1_000, drop_fraction=0.4, decay="constant", variant="torch")


def build(storage, dtype=torch.float32, method=RIGL):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).to(dtype)
    return fxsparse.compile(model, Plan(sparsity=0.7, storage=storage, method=method))


def batch(step, dtype):
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=0.01, **options)


def train(sparse, optimizer, dtype=torch.float32, call=None, parts=1, after=lambda: None):
    """Masks after every step, and the losses."""
    sparse.attach(optimizer)
    masks, losses = [sparse.masks()], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in batch(step, dtype).chunk(parts):
            loss = (call or sparse)(part).square().mean() / parts
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        masks.append(sparse.masks())
        after()
    assert int(sparse.state_dict()["fxsparse_step"]) == STEPS
    return masks, losses


def same(sparse, expected, close=torch.equal):
    for name, mask in expected.masks().items():
        assert torch.equal(sparse.masks()[name], mask), name
    for name, value in expected.dense_state_dict().items():
        assert close(sparse.dense_state_dict()[name], value), name


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_weights_and_gradients_in_single_precision_and_learns_alike(half, storage):
    def cast(x):
        with torch.autocast("cpu", half):
            y = sparse(x)
        assert y.dtype == half
        return y.float()

    plain = build(storage, method=RIGL_TORCH)
    _, expected = train(plain, adamw(plain.parameters()))
    sparse = build(storage, method=RIGL_TORCH)
    masks, losses = train(sparse, adamw(sparse.parameters()), call=cast)
    assert any(not torch.equal(masks[0][name], mask) for name, mask in masks[-1].items())
    assert sparse.sparsity() == plain.sparsity()
    assert (
        {p.dtype for p in sparse.parameters()}
        == {p.grad.dtype for p in sparse.parameters()}
        == {torch.float32}
    )
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_leaves_no_trace(fused, storage):
    def run(poisoned):
        sparse = build(storage, method=RIGL_TORCH)
        optimizer = adamw(sparse.parameters(), fused=fused)
        sparse.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step, poison in enumerate(poisoned):
            optimizer.zero_grad()
            number = step - sum(poisoned[:step])
            loss = sparse(batch(number, torch.float32)).square().mean()
            scaler.scale(loss * float("inf") if poison else loss).backward()
            scaler.step(optimizer)
            scaler.update(4.0)
        return sparse

    clean, skipping = run([False] * 5), run([False, True, False, True, True, False, False, False])
    same(skipping, clean)
    assert int(skipping.state_dict()["fxsparse_step"]) == 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_numbers_and_one_update_a_step(reentrant, storage):
    plain, sparse = build(storage), build(storage)
    expected = train(plain, adamw(plain.parameters()))
    again = train(
        sparse,
        adamw(sparse.parameters()),
        call=lambda x: checkpoint(sparse, x.requires_grad_(), use_reentrant=reentrant),
    )
    assert again[1] == expected[1]
    same(sparse, plain)
    assert sparse.report.topology.rows() == plain.report.topology.rows()


def test_accumulated_micro_batches_are_the_batch(storage):
    whole, parts = build(storage, torch.float64), build(storage, torch.float64)
    train(whole, adamw(whole.parameters()), torch.float64)
    train(parts, adamw(parts.parameters()), torch.float64, parts=3)
    same(parts, whole, torch.allclose)


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_fused_and_foreach_optimizers_move_the_same_masks(kind, storage):
    plain, other = build(storage, torch.float64), build(storage, torch.float64)
    train(plain, adamw(plain.parameters(), foreach=False, fused=False), torch.float64)
    train(other, adamw(other.parameters(), **{kind: True}), torch.float64)
    same(other, plain, torch.allclose)


def averaged(storage, follow):
    sparse = build(storage, torch.float64, RIGL_TORCH)
    average = AveragedModel(sparse, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    if follow:
        sparse.attach_average(average)
    masks, _ = train(
        sparse,
        adamw(sparse.parameters()),
        torch.float64,
        after=lambda: average.update_parameters(sparse),
    )
    return sparse, average, masks


def test_an_average_follows_the_masks(storage):
    sparse, average, masks = averaged(storage, follow=True)
    _, reference, _ = averaged("masked", follow=False)
    found, expected = average.module.dense_state_dict(), reference.module.dense_state_dict()
    torch.testing.assert_close(found["0.bias"], expected["0.bias"])
    for name, now in sparse.masks().items():
        history = torch.stack([each[name] for each in masks]).int()
        returned = (history.diff(dim=0) == 1).any(0) & history[0].bool() | (
            (history.diff(dim=0) == 1).sum(0) > 1
        )
        assert now.sum() > returned.sum()
        torch.testing.assert_close(found[name][~returned], expected[name][~returned])
        assert not found[name][~now].any()
    x = batch(0, torch.float64)
    torch.testing.assert_close(average.eval()(x), average.module.to_dense()(x))


def test_an_average_whose_values_mean_other_entries_by_now_is_refused(storage):
    _, average, _ = averaged(storage, follow=False)
    x = batch(0, torch.float64)
    if storage == "masked":
        torch.testing.assert_close(average.eval()(x), average.module.to_dense()(x))
        return
    for use in (lambda: average(x), average.module.to_dense, average.module.dense_state_dict):
        with pytest.raises(CheckpointError, match=r"'0.weight': this copy has averaged.*attach_average"):
            use()


def test_other_copies_are_left_alone(storage):
    sparse = build(storage)
    snapshot = copy.deepcopy(sparse)
    kept = snapshot.dense_state_dict()
    train(sparse, adamw(sparse.parameters()))
    assert all(torch.equal(value, kept[name]) for name, value in snapshot.dense_state_dict().items())
    train(snapshot, adamw(snapshot.parameters()))
    same(snapshot, sparse)
    with pytest.raises(PlanError, match=r"attach_average: expected AveragedModel\(sparse\)"):
        sparse.attach_average(sparse)
    with pytest.raises(PlanError, match="attach_average"):
        sparse.attach_average(nn.Linear(2, 2))


class Blockwise(torch.optim.Optimizer):
    """State as of 8-bit optimizers: bytes in the weight's shape, or packed in blocks, and a scale for each block."""

    def __init__(self, params, packed):
        super().__init__(params, {"lr": 0.01, "packed": packed})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                blocks = -(-p.numel() // 64)
                shape = (blocks, 64) if group["packed"] else p.shape
                self.state[p].setdefault("state1", torch.zeros(shape, dtype=torch.uint8))
                self.state[p].setdefault("absmax1", torch.zeros(blocks))
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("packed", [False, True])
def test_eight_bit_state_is_refused_at_the_first_step_that_makes_some(packed, storage):
    sparse = build(storage, method=set_(every=1_000, stop=10_000))
    optimizer = Blockwise(sparse.parameters(), packed)
    sparse.attach(optimizer)
    sparse(batch(0, torch.float32)).sum().backward()
    with pytest.raises(
        UnsupportedError, match=r"Blockwise keeps 'state1' of shape .*torch.uint8.*per-element state"
    ):
        optimizer.step()
