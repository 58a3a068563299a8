"""``sparse.exploring()``: what it tells the next update, and that it changes nothing else."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse import Plan
from fxsparse.errors import NumericsError, PlanError
from fxsparse.methods import gse, rigl, set_, srigl

METHODS = {
    "rigl": lambda **o: rigl(every=4, stop=100, drop_fraction=0.5, decay="constant", **o),
    "srigl": lambda **o: srigl(every=4, stop=100, drop_fraction=0.5, decay="constant", **o),
    "gse": lambda **o: gse(every=4, stop=100, drop_fraction=0.5, decay="constant", **o),
    "grabo": lambda **o: gse(every=4, stop=100, drop_fraction=0.5, decay="constant", sampling="grabo", **o),
    "graest": lambda **o: gse(every=4, stop=100, drop_fraction=0.5, decay="constant", sampling="graest", **o),
}
STORAGES = ["masked", "compact"]


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 8)
    ).to(dtype)


def build(method, storage, dtype=torch.float64):
    sparse = fxsparse.compile(net(dtype), Plan(sparsity=0.7, storage=storage, method=method))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer)
    return sparse, optimizer


def backward(call, seed, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 16, generator=generator, dtype=dtype)
    y = torch.randint(8, (12,), generator=generator)
    torch.manual_seed(seed)
    (nn.functional.cross_entropy(call(x), y) * scale).backward()


def step(sparse, optimizer, seed):
    optimizer.zero_grad()
    backward(sparse, seed)
    optimizer.step()


def explore(sparse, seed, **options):
    with sparse.exploring():
        backward(sparse, seed, **options)


def equal_masks(one, other):
    return all(torch.equal(mask, other.masks()[name]) for name, mask in one.masks().items())


def equal_states(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nothing_but_the_next_update_knows_of_it(method, storage):
    sparse, optimizer = build(method(), storage)
    plain, other = build(method(), storage)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for at in range(2):
        step(sparse, optimizer, at)
        step(plain, other, at)
    for model in (sparse, plain):
        backward(model, 5)  # gradients that are there already stay, and the backward after adds to them
    before = {name: (p.grad, p.grad.clone()) for name, p in sparse.named_parameters()}
    random, rate = torch.get_rng_state(), schedule.get_last_lr()
    explore(sparse, 9)
    assert torch.equal(torch.get_rng_state(), random)
    assert schedule.get_last_lr() == rate
    assert all(p.grad is before[name][0] for name, p in sparse.named_parameters())
    assert all(torch.equal(p.grad, before[name][1]) for name, p in sparse.named_parameters())
    assert equal_states(sparse, plain)
    assert next(iter(optimizer.state.values()))["step"] == next(iter(other.state.values()))["step"]
    for at in (2, 3):
        step(sparse, optimizer, at)
        step(plain, other, at)
    if method().schedule.skip_step:  # the update comes around the fifth step
        assert equal_masks(sparse, plain)
        step(sparse, optimizer, 4)
        step(plain, other, 4)
    assert not equal_masks(sparse, plain)  # each by its own batch


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_update_goes_by_the_explored_batch_and_the_optimizer_steps(method, storage):
    explored, optimizer = build(method(), storage)
    for at in range(3):
        step(explored, optimizer, at)
    twin = copy.deepcopy(explored)
    other = torch.optim.AdamW(twin.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.attach(other)
    explore(explored, 9)
    explore(twin, 9)
    fires = 5 if method().schedule.skip_step else 4
    for at in range(3, fires):
        # The step of the update has another batch in the twin.  Its weights differ then, but not its choice to grow.
        step(explored, optimizer, at)
        step(twin, other, at if at < fires - 1 else 77)
    before, bias = explored.masks(), explored.state_dict()["4.bias"]
    assert not torch.equal(bias, twin.state_dict()["4.bias"])
    assert any(
        not torch.equal(mask, net_mask)
        for mask, net_mask in zip(before.values(), build(method(), storage)[0].masks().values(), strict=True)
    )
    assert not explored._emitted.updates._explored


@pytest.mark.parametrize(
    "method", [m for n, m in METHODS.items() if n != "srigl"], ids=lambda m: m().rule.__class__.__name__
)
def test_both_storages_choose_the_same_from_what_was_explored(method):
    (masked, first), (compact, second) = build(method(), "masked"), build(method(), "compact")
    for at in range(9):
        for sparse, optimizer in ((masked, first), (compact, second)):
            if at % 4 == 2:
                explore(sparse, 100 + at)
                explore(sparse, 200 + at)
            step(sparse, optimizer, at)
        assert equal_masks(masked, compact)


def test_blocks_add_up_as_micro_batches_do():
    (one, first), (two, second) = build(METHODS["rigl"](), "masked"), build(METHODS["rigl"](), "masked")
    explore(one, 7)
    explore(one, 8)
    with two.exploring():
        backward(two, 7)
        backward(two, 8)
    for sparse, optimizer in ((one, first), (two, second)):
        step(sparse, optimizer, 0)
    assert equal_masks(one, two)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_block_within_an_armed_step_takes_its_place(storage):
    (sparse, optimizer), (other, second) = build(METHODS["gse"](), storage), build(METHODS["gse"](), storage)
    for at in range(4):
        step(sparse, optimizer, at)
        step(other, second, at)
    optimizer.zero_grad()
    backward(sparse, 4)  # armed, and given up
    explore(sparse, 9)
    backward(sparse, 5)
    optimizer.step()
    explore(other, 9)
    second.zero_grad()
    backward(other, 4)
    backward(other, 5)
    second.step()
    assert equal_states(sparse, other)


def test_what_was_explored_is_used_once_and_lost_with_a_loaded_state():
    sparse, optimizer = build(METHODS["gse"](), "compact")
    plain, other = build(METHODS["gse"](), "compact")
    explore(sparse, 9)
    sparse.load_state_dict(sparse.state_dict())
    explore(plain, 9)
    assert plain._emitted.updates._explored
    for at in range(10):
        if at == 5:
            assert not plain._emitted.updates._explored
        step(sparse, optimizer, at)
        step(plain, other, at)
    assert not equal_masks(sparse, plain)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_resumes_bit_for_bit_from_between_exploring_and_the_update(method, storage, tmp_path):
    sparse, optimizer = build(method(), storage)
    for at in range(3):
        step(sparse, optimizer, at)
    explore(sparse, 9)
    torch.save((sparse.state_dict(), optimizer.state_dict()), tmp_path / "run.pt")
    resumed, again = build(method(), storage)
    model_state, optimizer_state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(model_state)
    again.load_state_dict(optimizer_state)
    explore(resumed, 9)  # it is not saved
    for at in range(3, 10):
        step(sparse, optimizer, at)
        step(resumed, again, at)
        assert equal_states(sparse, resumed)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_under_autocast_and_a_scaler(method):
    sparse, optimizer = build(method(), "compact", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = sparse.masks()
    for at in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if at == 3:
                explore(sparse, 9, dtype=torch.float32)
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(at)
            loss = sparse(torch.randn(12, 16, generator=generator)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())


def test_a_step_that_the_scaler_skips_leaves_it_for_the_next():
    sparse, optimizer = build(METHODS["rigl"](), "masked")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    explore(sparse, 9)
    start = sparse.masks()
    for poison in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(sparse(torch.randn(12, 16, dtype=torch.float64)).square().mean() * poison).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())
        assert moved is (poison == 1.0)


def test_the_walk_tier_explores_too():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, x):
            return self.inner(x) if float(x.sum()) < 1e9 else x

    plan = Plan(sparsity=0.7, storage="masked", method=METHODS["graest"]())
    walked, graph = fxsparse.compile(Opaque(), plan), build(METHODS["graest"](), "masked")[0]
    assert walked._emitted.program.tier == "walk"
    for sparse in (copy.deepcopy(walked), walked, graph):
        optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
        sparse.attach(optimizer)
        start = sparse.masks()
        for at in range(5):
            if at == 1:
                explore(sparse, 9)
                assert len(sparse._emitted.updates._explored.observed) == 2
            step(sparse, optimizer, at)
        assert any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())


def test_what_cannot_explore_says_why():
    sparse, _ = build(set_(), "masked")
    with pytest.raises(PlanError, match="set chooses its entries without gradients"), sparse.exploring():
        pass
    sparse, _ = build(METHODS["gse"](), "masked")
    with pytest.raises(PlanError, match="expected a backward through sparse weights"), sparse.exploring():
        pass
    with pytest.raises(NumericsError, match=r"expected finite gradients, got inf or NaN at '0\.weight'"):
        explore(sparse, 0, scale=float("inf"))
    with pytest.raises(PlanError, match="got one in eval mode"), sparse.eval().exploring():
        pass
    assert not sparse._emitted.updates.switch.exploring


def test_compiled_with_at_most_two_frames():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for storage, method in (("compact", METHODS["gse"]), ("masked", METHODS["grabo"])):
        counter.frame_count = 0
        (sparse, optimizer), (plain, other) = build(method(), storage), build(method(), storage)
        call = torch.compile(sparse, backend=counter, fullgraph=True)
        for at in range(14):
            for model, one, run in ((sparse, optimizer, call), (plain, other, plain)):
                if at % 4 == 2 and at < 8:
                    with model.exploring():
                        backward(run, 100 + at)
                one.zero_grad()
                backward(run, at)
                one.step()
        assert counter.frame_count <= 2
        assert equal_masks(sparse, plain)


def ranks(rank, world, directory):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    for storage, name, wrapped in (
        ("masked", "rigl", False),
        ("masked", "graest", True),
        ("compact", "graest", True),
        ("compact", "gse", False),
    ):
        explore_on_ranks(rank, storage, name, wrapped)
    dist.destroy_process_group()


def explore_on_ranks(rank, storage, name, wrapped):
    sparse, _ = build(METHODS[name](), storage)
    ddp = DistributedDataParallel(sparse, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    sparse.attach(optimizer)
    start = sparse.masks()
    for at in range(
        9
    ):  # up to an update: DistributedDataParallel sends rank 0's masks along with the next forward
        optimizer.zero_grad()
        backward(ddp, 1000 * rank + at)
        if at % 4 == 2:
            before = [p.grad.clone() for p in sparse.parameters()]
            with sparse.exploring():
                backward(ddp if wrapped else sparse, 5000 * rank + at)
            assert all(torch.equal(p.grad, b) for p, b in zip(sparse.parameters(), before, strict=True))
        optimizer.step()
    sparse.verify_sync()
    assert any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())


def test_ranks_agree(tmp_path):
    mp.spawn(ranks, (2, str(tmp_path)), nprocs=2)
