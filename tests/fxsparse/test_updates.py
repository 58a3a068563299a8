"""The update engine: which steps count, what moves with a mask, and that both storages choose the same entries."""

import copy
import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.method import Probe
from fxsparse.methods import gmp, rigl, set_, sr_ste, static
from fxsparse.pattern import NM, Block, ConstantFanIn, Unstructured


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 16, generator=generator, dtype=dtype), torch.randint(8, (12,), generator=generator)


def backward(model, step, dtype=torch.float32):
    x, y = batch(step, dtype)
    nn.functional.cross_entropy(model(x), y).backward()


def train(model, optimizer, steps, dtype=torch.float32, first=0):
    """Masks after every step, by weight name."""
    history = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step, dtype)
        optimizer.step()
        history.append({name: mask.clone() for name, mask in model.masks().items()})
    return history


def changes(history):
    return [any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(history)]


class Muon(torch.optim.Optimizer):
    """An optimizer whose step is dense whatever the gradient's zeros: momentum, orthogonalised."""

    def __init__(self, params, lr=0.02):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.mul_(0.9).add_(p.grad)
                step = torch.linalg.qr(momentum)[0] if p.dim() == 2 else momentum
                p.add_(step.reshape(p.shape) if step.shape == p.shape else momentum, alpha=-group["lr"])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "muon-like": Muon,
}


def test_rigl_moves_masks_at_every_multiple_of_its_period_and_stops():
    sparse = fxsparse.compile(
        net(), Plan(sparsity=0.8, method=rigl(every=3, stop=10, drop_fraction=0.5, decay="constant"))
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    start = [sparse.masks()]
    moved = changes(start + train(sparse, optimizer, 14))
    assert [step for step, m in enumerate(moved) if m] == [0, 3, 6, 9]


def test_an_update_of_rigl_takes_the_place_of_the_optimizer_step():
    sparse = fxsparse.compile(net(), Plan(sparsity=0.8, method=rigl(every=2, stop=10, drop_fraction=0.5)))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    bias = sparse.state_dict()["0.bias"].clone()
    train(sparse, optimizer, 1)
    assert torch.equal(sparse.state_dict()["0.bias"], bias)
    train(sparse, optimizer, 1, first=1)
    assert not torch.equal(sparse.state_dict()["0.bias"], bias)


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nothing_behind_the_mask_survives_in_weight_or_state(make, storage):
    plan = Plan(
        sparsity=0.7, storage=storage, method=rigl(every=2, stop=40, drop_fraction=0.5, variant="torch")
    )
    sparse = fxsparse.compile(net(), plan)
    optimizer = make(sparse.parameters())
    sparse.attach(optimizer)
    train(sparse, optimizer, 12)
    weights, masks = sparse.dense_state_dict(), sparse.masks()
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
        if storage == "masked":
            assert not sparse.get_parameter(name)[~mask].any()
            states = [
                s for s in optimizer.state[sparse.get_parameter(name)].values() if s.shape == mask.shape
            ]
            assert not any(state[~mask].any() for state in states)


def test_a_grown_entry_starts_with_weight_and_state_at_zero_and_a_kept_one_keeps_both():
    plan = Plan(sparsity=0.7, storage="masked", method=set_(every=5, stop=6, drop_fraction=0.5))
    sparse = fxsparse.compile(net(), plan)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer)
    train(sparse, optimizer, 4)
    other = copy.deepcopy(sparse)
    twin = torch.optim.AdamW(other.parameters(), lr=0.01)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = sparse.masks()["0.weight"]
    train(sparse, optimizer, 1, first=4)
    train(other, twin, 1, first=4)
    after, weight = sparse.masks()["0.weight"], sparse.get_parameter("0.weight")
    grown, kept = after & ~before, after & before
    assert grown.any()
    assert (before & ~after).sum() == grown.sum()
    for state, reference in zip(
        optimizer.state[weight].values(), twin.state[other.get_parameter("0.weight")].values(), strict=True
    ):
        if state.shape == after.shape:
            assert not state[grown].any()
            assert torch.equal(state[kept], reference[kept])
    assert not weight[grown].any()
    assert torch.equal(weight[kept], other.get_parameter("0.weight")[kept])


def test_micro_batches_evaluation_and_checkpointing_do_not_count_as_steps():
    def run(micro_batches, interludes):
        sparse = fxsparse.compile(net(), Plan(sparsity=0.8, method=rigl(every=3, stop=20)))
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        sparse.attach(optimizer)
        for step in range(8):
            optimizer.zero_grad()
            x, y = batch(step)
            for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                loss = nn.functional.cross_entropy(
                    torch.utils.checkpoint.checkpoint(sparse, part_x, use_reentrant=False)
                    if interludes
                    else sparse(part_x),
                    part_y,
                )
                (loss / micro_batches).backward()
            if interludes:
                sparse.eval()(x)
                sparse.train()
            optimizer.step()
        return sparse.masks()

    plain = run(1, interludes=False)
    for other in (run(3, interludes=False), run(3, interludes=True)):
        for name, mask in plain.items():
            assert torch.equal(mask, other[name])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_grad_scaler_skips_does_not_count(fused):
    sparse = fxsparse.compile(net(), Plan(sparsity=0.8, method=rigl(every=1, stop=20)))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, fused=fused)
    sparse.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    start = sparse.masks()
    for poison in (True, False):
        optimizer.zero_grad()
        x, y = batch(0)
        loss = nn.functional.cross_entropy(sparse(x), y)
        scaler.scale(loss * float("inf") if poison else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())
        assert moved is not poison
        assert int(sparse.state_dict()["fxsparse_step"]) == (0 if poison else 1)


def test_attach_twice_and_explicit_calls_count_a_step_once():
    def run(drive):
        sparse = fxsparse.compile(net(), Plan(sparsity=0.8, method=set_(every=3, stop=20)))
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        drive(sparse, optimizer, attach=True)
        told = []
        for step in range(9):
            optimizer.zero_grad()
            backward(sparse, step)
            optimizer.step()
            told.append(drive(sparse, optimizer, attach=False))
        return sparse.masks(), int(sparse.state_dict()["fxsparse_step"]), told

    def hooks(sparse, optimizer, attach):
        sparse.attach(optimizer)

    def calls(sparse, optimizer, attach):
        return None if attach else sparse.update_masks(optimizer)

    def both(sparse, optimizer, attach):
        sparse.attach(optimizer)
        return None if attach else [sparse.update_masks(optimizer), sparse.update_masks(optimizer)][0]

    (masks, count, _), *others = [run(drive) for drive in (hooks, calls, both)]
    assert count == 9
    for other_masks, other_count, told in others:
        assert other_count == 9
        assert [step + 1 for step, moved in enumerate(told) if moved] == [3, 6, 9]
        assert all(torch.equal(masks[name], other_masks[name]) for name in masks)


@pytest.mark.parametrize("pattern", [Unstructured(), ConstantFanIn(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_compact_rigl_picks_exactly_what_masked_rigl_picks(pattern, micro_batches):
    histories = []
    for storage in ("masked", "compact"):
        plan = Plan(
            sparsity=None if isinstance(pattern, NM) else 0.75,
            pattern=pattern,
            storage=storage,
            method=rigl(every=2, stop=200, drop_fraction=0.4),
        )
        sparse = fxsparse.compile(net(torch.float64), plan)
        assert {row["storage"] for row in sparse.report.to_dict()["layers"]} == {storage}
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
        sparse.attach(optimizer)
        history = []
        for step in range(100):
            optimizer.zero_grad()
            x, y = batch(step, torch.float64)
            for part_x, part_y in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                nn.functional.cross_entropy(sparse(part_x), part_y).backward()
            optimizer.step()
            history.append(sparse.masks())
        histories.append(history)
    for masked, compact in zip(*histories, strict=True):
        for name, mask in masked.items():
            assert torch.equal(mask, compact[name])
    assert any(changes(histories[0]))


METHODS = {
    "set": set_(every=1, stop=1_000, drop_fraction=0.3),
    "rigl": rigl(every=1, stop=1_000, drop_fraction=0.3),
    "rigl-torch": rigl(every=1, stop=1_000, drop_fraction=0.3, variant="torch"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        *((name, Unstructured()) for name in METHODS),
        *(("rigl", pattern) for pattern in (ConstantFanIn(), NM(1, 4), Block(2, 4))),
    ],
    ids=str,
)
def test_nnz_is_exactly_feasible_after_a_thousand_updates(method, pattern):
    plan = Plan(sparsity=0.75, pattern=pattern, method=METHODS[method], storage="masked")
    torch.manual_seed(0)
    sparse = fxsparse.compile(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), plan)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9)
    sparse.attach(optimizer)
    target = {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    x = torch.randn(4, 8)
    for _ in range(1_000):
        optimizer.zero_grad()
        sparse(x).square().sum().backward()
        optimizer.step()
    for name, mask in sparse.masks().items():
        pattern.check(mask)
        assert int(mask.sum()) == target[name] == pattern.feasible(mask.shape, target[name])


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize(
    "method", [*METHODS.values(), gmp(start=2, stop=14, every=3), static("random")], ids=lambda m: m.name
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(method, storage, tmp_path):
    def fresh():
        sparse = fxsparse.compile(net(seed=1), Plan(sparsity=0.7, method=method, storage=storage))
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
        sparse.attach(optimizer)
        return sparse, optimizer

    whole, optimizer = fresh()
    train(whole, optimizer, 7)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    train(whole, optimizer, 9, first=7)
    resumed, optimizer = fresh()
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 9, first=7)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_an_optimizer_of_the_dense_parameters_is_refused_in_compact_storage():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = fxsparse.compile(model, Plan(sparsity=0.9, storage="compact"))
    with pytest.raises(PlanError, match=r"does not hold '0.weight'.*compact values.*sparse.parameters\(\)"):
        sparse.attach(optimizer)


def test_an_optimizer_handed_to_compile_goes_on_with_its_state():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    backward(model, 0)
    optimizer.step()
    moments = optimizer.state[model[0].weight]["exp_avg"].clone()
    sparse = fxsparse.compile(model, Plan(sparsity=0.75, storage="compact"), optimizer=optimizer)
    rows, cols = sparse.coordinates()["0.weight"]
    values = dict(sparse.named_parameters())["0.weight.values"]
    assert torch.equal(optimizer.state[values]["exp_avg"], moments[rows, cols])
    train(sparse, optimizer, 3)
    assert int(sparse.state_dict()["fxsparse_step"]) == 3


def test_sr_ste_moves_its_mask_after_every_step_and_keeps_two_of_four():
    sparse = fxsparse.compile(net(), Plan(pattern=NM(2, 4), method=sr_ste()))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.5)
    sparse.attach(optimizer)
    moved = changes([sparse.masks(), *train(sparse, optimizer, 10)])
    assert sum(moved) >= 8
    hidden = sparse.get_parameter("0.weight")[~sparse.masks()["0.weight"]]
    assert hidden.any()
    NM(2, 4).check(sparse.masks()["0.weight"])


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_skipped_step_leaves_nothing_in_the_next_probe(storage):
    def run(poisoned):
        sparse = fxsparse.compile(net(), Plan(sparsity=0.8, storage=storage, method=rigl(every=1, stop=20)))
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        sparse.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for poison in poisoned:
            optimizer.zero_grad()
            for part in (0, 1):  # micro-batches: both of a skipped step have to go
                x, y = batch(part + 5 * poison)
                loss = nn.functional.cross_entropy(sparse(x), y)
                scaler.scale(loss * float("inf") if poison and part else loss).backward()
            scaler.step(optimizer)
            scaler.update(4.0)
        return sparse.masks()

    expected = run([False])
    assert all(torch.equal(mask, expected[name]) for name, mask in run([True, True, False]).items())


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize(
    "method", [set_(every=1), rigl(every=1, stop=9), gmp(start=0, stop=4, every=1)], ids=lambda m: m.name
)
def test_the_mask_of_a_frozen_weight_never_moves(method, storage):
    model = net()
    model[0].weight.requires_grad_(False)
    sparse = fxsparse.compile(model, Plan(sparsity=0.7, storage=storage, method=method))
    optimizer = torch.optim.SGD([p for p in sparse.parameters() if p.requires_grad], lr=0.1)
    sparse.attach(optimizer)
    before, weight = sparse.masks()["0.weight"], sparse.dense_state_dict()["0.weight"]
    train(sparse, optimizer, 6)
    assert torch.equal(sparse.masks()["0.weight"], before)
    assert torch.equal(sparse.dense_state_dict()["0.weight"], weight)


def test_two_copies_that_train_in_turns_keep_their_probes_apart():
    plan = Plan(sparsity=0.8, storage="compact", method=rigl(every=1, stop=20, drop_fraction=0.5))
    first = fxsparse.compile(net(), plan)
    second = copy.deepcopy(first)
    alone = copy.deepcopy(first)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second)]
    for model, optimizer, data in zip((first, second), optimizers, (1, 2), strict=True):
        model.attach(optimizer)
        backward(model, data)  # both backwards come before either step
    for optimizer in optimizers:
        optimizer.step()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    alone.attach(optimizer)
    backward(alone, 1)
    optimizer.step()
    assert all(torch.equal(mask, alone.masks()[name]) for name, mask in first.masks().items())
    assert any(not torch.equal(mask, second.masks()[name]) for name, mask in first.masks().items())


@dataclass(frozen=True)
class _ReadsTwice:
    """Keeps its mask, and notes what it was shown."""

    seen: list = field(default_factory=list, hash=False)
    probe: ClassVar[Probe] = Probe.DENSE

    def __call__(self, view):
        gradients = [torch.cat([tile for _, tile in view.gradient_tiles()]) for _ in range(2)]
        self.seen.append((view.budget, *gradients))
        return view.active


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_rule_sees_the_budget_and_may_read_the_gradient_twice(storage):
    rule = _ReadsTwice()
    method = dataclasses.replace(rigl(every=1, stop=10, variant="torch"), rule=rule)
    plan = Plan(sparsity=0.7, allocation="uniform", pattern=ConstantFanIn(), storage=storage, method=method)
    sparse = fxsparse.compile(net(), plan)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    train(sparse, optimizer, 2)
    assert [budget for budget, *_ in rule.seen] == [115, 57, 115, 57]  # 0.3 of 24 x 16 and of 8 x 24
    for _, first, second in rule.seen:
        assert first.any()
        assert torch.equal(first, second)
