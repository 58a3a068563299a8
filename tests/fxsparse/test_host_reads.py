"""Ordinary steps ask the device for no number, so that a GPU is never waited for and a CUDA graph can hold them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxsparse
from fxsparse import Plan
from fxsparse.formats import csr
from fxsparse.kernels import probe
from fxsparse.kernels.csr import patches, reference
from fxsparse.kernels.csr.conv import window
from fxsparse.methods import gse, rigl, set_, srigl, static
from fxsparse.testing import forbid_host_reads

METHODS = {
    "static": static("magnitude"),
    "set": set_(every=3),
    "rigl": rigl(every=3, stop=100),
    "srigl": srigl(every=3, stop=100),
    "gse": gse(every=3, stop=100),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.head = nn.Linear(8 * 16, 24), nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(F.relu(self.wide(x)))


def compiled(method, storage, device="cpu"):
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, 4, 4, device=device), torch.randint(10, (8,), device=device)
    sparse = fxsparse.compile(Net().to(device), Plan(sparsity=0.5, method=method, storage=storage))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    sparse.attach(optimizer)
    return sparse, optimizer, x, y


def step(sparse, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(sparse(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("name", METHODS)
def test_ordinary_steps_read_nothing(name, storage):
    sparse, optimizer, x, y = compiled(METHODS[name], storage)
    schedule = METHODS[name].schedule
    for number in range(6):
        if schedule is not None and schedule.fires(number if schedule.skip_step else number + 1):
            step(sparse, optimizer, x, y)
        else:
            with forbid_host_reads():
                step(sparse, optimizer, x, y)
    assert sparse._emitted.updates.step == 6


@pytest.mark.parametrize("read", [int, bool, torch.nonzero, lambda t: t[t > 0], lambda t: torch.equal(t, t)])
def test_reads_are_seen_and_gathers_are_none(read):
    x, places = torch.ones(1), torch.tensor([0])
    with forbid_host_reads():
        x[places] = x[places] + 1
    with (
        pytest.raises(AssertionError, match=r"makes the host wait for numbers of \[\[1\]"),
        forbid_host_reads(),
    ):
        read(x)


def test_an_update_does_read():
    sparse, optimizer, x, y = compiled(rigl(every=1, stop=100), "masked")
    with pytest.raises(AssertionError, match="makes the host wait"), forbid_host_reads():
        step(sparse, optimizer, x, y)


def test_the_products_in_plain_pytorch_read_nothing():
    mask = torch.rand(6, 36) < 0.4
    index, weight = csr.from_mask(mask), torch.randn(6, 36)
    values, x, grad = csr.values_of(weight, index), torch.randn(5, 36), torch.randn(5, 6)
    images, numbers = torch.randn(2, 4, 5, 5), window((3, 3), 4, padding=1)
    upstream = torch.randn(2, 6, 5, 5)
    with forbid_host_reads():
        reference.linear(x, values, index.crow, index.cols, 36, None, 1)
        reference.linear_backward(
            grad, x, values, index.crow, index.cols, index.ccol, index.rows_t, index.perm, True, True, True
        )
        patches.conv(images, values, index.crow, index.cols, None, numbers)
        patches.conv_backward(upstream, images, values, index.crow, index.cols, numbers, True, True)
        probe.stash(x, grad, 10**9)
    probe.clear(10**9)


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_forward_of_cuda_tensors_without_numbers(storage):
    sparse, _, x, y = compiled(METHODS["srigl"], storage)
    with FakeTensorMode():
        tensors = {**dict(sparse.named_parameters()), **dict(sparse.named_buffers())}
        there = {name: torch.empty(t.shape, dtype=t.dtype, device="cuda") for name, t in tensors.items()}
        images, labels = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (x, y))
        loss = F.cross_entropy(torch.func.functional_call(sparse, there, (images,)), labels)
    assert loss.device.type == "cuda"


def test_gradients_keep_their_tensors_where_an_exploring_batch_moves_the_masks():
    sparse, optimizer, x, y = compiled(rigl(every=2, stop=10, variant="torch"), "masked")
    step(sparse, optimizer, x, y)
    before = {name: mask.clone() for name, mask in sparse.masks().items()}
    held = {name: parameter.grad for name, parameter in sparse.named_parameters()}
    with sparse.exploring():
        F.cross_entropy(sparse(x), y).backward()
    for gradient in held.values():  # as the replay of a graph would
        gradient.fill_(1.0)
    optimizer.step()
    assert any(not torch.equal(mask, before[name]) for name, mask in sparse.masks().items())
    for name, parameter in sparse.named_parameters():
        assert parameter.grad is held[name]
        if name in before:
            assert torch.equal(parameter.grad, before[name].float())


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_an_update_without_its_own_forward_is_left_out(storage):
    sparse, optimizer, x, y = compiled(rigl(every=2, stop=10, variant="torch"), storage)
    step(sparse, optimizer, x, y)
    before = sparse.masks()
    with torch.no_grad():
        sparse(x)
    for parameter in sparse.parameters():  # what the replay of a graph of the ordinary step does
        parameter.grad = torch.ones_like(parameter)
    with pytest.warns(UserWarning, match="give the update a batch in exploring"):
        optimizer.step()
    assert all(torch.equal(mask, before[name]) for name, mask in sparse.masks().items())


def test_whether_a_scaled_step_counted_is_read_when_an_update_is_near():
    poison = [False, True, False, False, True, False, False, False, False]
    sparse, _, x, y = compiled(set_(every=5), "masked")
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, fused=True)
    sparse.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counted, moved = [], []

    def scaled(bad):
        optimizer.zero_grad()
        loss = F.cross_entropy(sparse(x), y)
        scaler.scale(loss * torch.inf if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for number, bad in enumerate(poison):
        before = {name: mask.clone() for name, mask in sparse.masks().items()}
        if number < 3:  # from then on the fifth of them may be the next
            with forbid_host_reads():
                scaled(bad)
        else:
            scaled(bad)
        counted.append(int(sparse.get_buffer("fxsparse_step")))
        moved.append(any(not torch.equal(mask, before[name]) for name, mask in sparse.masks().items()))
    assert counted == [1, 1, 2, 3, 3, 4, 5, 6, 7]
    assert [number for number, did in enumerate(moved) if did] == [6]
    assert sparse._emitted.updates.step == 7


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_is_not_waited_for(name, storage):
    sparse, optimizer, x, y = compiled(METHODS[name], storage, "cuda")
    for _ in range(4):
        step(sparse, optimizer, x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(sparse, optimizer, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_graph_goes_on_with_masks_that_move_outside_it(storage):
    sparse, optimizer, x, y = compiled(rigl(every=4, stop=100, variant="torch"), storage, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(sparse(x), y).backward()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = F.cross_entropy(sparse(x), y)
        loss.backward()
    for number in range(1, 10):
        before = {name: mask.clone() for name, mask in sparse.masks().items()}
        if number % 4 == 0:
            with sparse.exploring():
                F.cross_entropy(sparse(x), y).backward()
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(loss, F.cross_entropy(sparse(x), y))
        optimizer.step()
        moved = any(not torch.equal(mask, before[name]) for name, mask in sparse.masks().items())
        assert moved is (number % 4 == 0)
