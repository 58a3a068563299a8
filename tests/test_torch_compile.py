"""torch.compile of a SparseModule: the same numbers, and at most two frames over many mask updates."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import fxsparse
from fxsparse import Plan
from fxsparse.methods import rigl, srigl


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def pruned(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.1)
    return model.eval()


RIGL = rigl(every=2, stop=10_000, drop_fraction=0.3, decay="constant", variant="torch")
SRIGL = srigl(every=2, stop=10_000, drop_fraction=0.3, decay="constant", gamma_sal=0.95)


def run(storage, steps, compiled, backend="aot_eager", method=RIGL):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    sparse = fxsparse.compile(net(), Plan(sparsity=0.8, storage=storage, method=method))
    call = torch.compile(sparse, backend=counter, fullgraph=True) if compiled else sparse
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    sparse.attach(optimizer)
    losses, moved = [], 0
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
        loss = call(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        moved += sparse.update_masks(optimizer)
    return losses, sparse.masks(), counter.frame_count, moved


@pytest.mark.parametrize("method", [RIGL, SRIGL], ids=["rigl", "srigl"])
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_two_frames_and_the_same_numbers_over_two_hundred_mask_updates(storage, method):
    losses, masks, frames, moved = run(storage, 400, compiled=True, method=method)
    expected, expected_masks, _, _ = run(storage, 400, compiled=False, method=method)
    assert frames <= 2
    assert moved >= 199
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(masks[name], expected_masks[name]) for name in masks)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_inductor_gives_the_same_numbers(storage):
    losses, _, frames, _ = run(storage, 6, compiled=True, backend="inductor")
    expected, _, _, _ = run(storage, 6, compiled=False)
    assert frames <= 2
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_dynamic_batch_compiles_once(storage):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    sparse = fxsparse.compile(net(), Plan(sparsity=0.8, storage=storage)).eval()
    call = torch.compile(sparse, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 7):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(call(x), sparse(x))
    assert counter.frame_count == 1


def test_an_inference_artefact_compiles_once_for_all_batches():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast = fxsparse.compile(pruned(net()), mode="infer", example_inputs=(torch.randn(4, 16),))
    call = torch.compile(fast, backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 7):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(call(x), fast(x))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_the_modes_of_inductor(mode):
    torch._dynamo.reset()
    graphs = counters["stats"]["unique_graphs"]
    sparse = fxsparse.compile(net(), Plan(sparsity=0.8, method=RIGL))
    call = torch.compile(sparse, mode=mode, fullgraph=True)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer)
    for _ in range(5):
        x = torch.randn(12, 16)
        y = call(x)
        torch.testing.assert_close(y, sparse(x), rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] - graphs <= 2
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=(x,))
    call = torch.compile(fast, mode=mode, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (3, 5):
            x = torch.randn(batch, 16)
            torch.testing.assert_close(call(x), fast(x), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] - graphs <= 3
