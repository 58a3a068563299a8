"""A network that starts on meta never has a tensor of a dense weight's size, whatever is done with it."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxsparse
from fxsparse import Plan, module
from fxsparse.kernel import registered
from fxsparse.methods import set_, static
from fxsparse.pattern import ConstantFanIn, Unstructured

WIDTH = 128


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


X = torch.randn(8, WIDTH)


class _Largest(TorchDispatchMode):
    """The largest result with memory of any op."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.op = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and not tensor.is_meta:
                kept = 0 if tensor.is_mkldnn else tensor.untyped_storage().nbytes()  # that one has no storage
                size = max(tensor.numel(), kept // tensor.element_size())
                if size > self.numel:
                    self.numel, self.op = size, str(func)
        return result


@contextmanager
def never_dense() -> Iterator[None]:
    with _Largest() as largest:
        yield
    assert 0 < largest.numel < WIDTH * WIDTH, largest.op


def always_sparse(method, pattern=None):
    with torch.device("meta"):
        model = Mlp()
    plan = Plan(sparsity=0.9, method=method, allocation="er", pattern=pattern or Unstructured())
    return fxsparse.compile(model, plan, example_inputs=X)


def train(sparse, optimizer, steps=4):
    sparse.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(sparse(X), X).backward()
        optimizer.step()


def test_the_check_sees_what_is_dense() -> None:
    with pytest.raises(AssertionError, match="aten"), never_dense():
        fxsparse.compile(Mlp(), Plan(sparsity=0.9), example_inputs=X)
    sparse = always_sparse(static("random"))
    with pytest.raises(AssertionError, match="aten"), never_dense():
        sparse.to_dense()


@pytest.mark.parametrize("method", [static("random"), set_(every=2)], ids=lambda method: method.name)
@pytest.mark.parametrize("pattern", [Unstructured(), ConstantFanIn()], ids=str)
def test_compiled_trained_updated_and_saved(method, pattern, tmp_path) -> None:
    with never_dense():
        sparse = always_sparse(method, pattern)
        before = {name: weight.active() for name, weight in sparse.weights()}
        train(sparse, torch.optim.Adam(sparse.parameters()))
        state = sparse.state_dict()
        sparse.load_state_dict(state)
        sparse.sparsity(), sparse.coordinates(), str(sparse.report)
        fxsparse.save(sparse, tmp_path / "file")
        with torch.device("meta"):
            model = Mlp()
        loaded = fxsparse.load(tmp_path / "file", model)
        train(loaded, torch.optim.Adam(loaded.parameters()), steps=1)
        pickle.loads(pickle.dumps(sparse))
    moved = {name: not torch.equal(before[name], weight.active()) for name, weight in sparse.weights()}
    assert set(moved.values()) == {method.rule is not None}
    assert all(row["nnz"] == len(before[row["name"]]) for row in sparse.report.layers)


@pytest.mark.parametrize("pattern", [Unstructured(), ConstantFanIn()], ids=str)
@pytest.mark.parametrize("measured", [True, False], ids=["measured", "without example inputs"])
def test_served_without_a_dense_weight(pattern, measured, monkeypatch, tmp_path) -> None:
    sparse = always_sparse(set_(every=2), pattern)
    train(sparse, torch.optim.Adam(sparse.parameters()))
    fxsparse.save(sparse, tmp_path / "file")
    with torch.device("meta"):
        model = Mlp()
    monkeypatch.setattr(module, "MAX_DENSE_BYTES", 2 * 4 * WIDTH * WIDTH - 1)
    with never_dense():
        trained = fxsparse.load(tmp_path / "file", model)
        fast = fxsparse.compile(trained, mode="infer", example_inputs=X if measured else None)
        got = fast(X)
    torch.testing.assert_close(got, sparse.eval()(X).detach())
    assert trained.training, "the model is left as it was"
    for row, (_, weight) in zip(fast.report.layers, sparse.weights(), strict=True):
        assert row["kernel"] == "cpu-csr-train" or registered()[row["kernel"]].pack_entries is not None
        assert (row["nnz"], row["dense_us"]) == (len(weight.active()), None)
        assert (
            "neither compared with dense nor timed against it: dense weights would take 131,072"
            in row["reason"]
        )
        assert not measured or 0 < row["flops_executed"] < row["flops_dense"]
    assert any("the training module" in note for note in fast.report.notes) == measured
    assert torch.equal(pickle.loads(pickle.dumps(fast))(X), got)


def test_a_dense_weight_that_fits_is_measured_against(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_DENSE_BYTES", 2 * 4 * WIDTH * WIDTH)
    with pytest.raises(AssertionError, match=r"aten|mkl"), never_dense():
        fxsparse.compile(always_sparse(static("random")), mode="infer", example_inputs=X)


class Mixed(nn.Module):
    """Convolutions with a norm, an activation to fuse, and a weight that is kept dense."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.other = nn.Conv2d(32, 32, 3, stride=2)
        self.first, self.head = nn.Linear(32 * 9, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.other(torch.relu(self.norm(self.conv(x)))))
        return self.head(torch.relu(self.first(x.flatten(1))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_convolutions_and_dense_layers_are_served_beside(dtype, monkeypatch) -> None:
    plan = Plan(sparsity=0.9, method=static("random"), storage="compact", exclude=("head",))
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    sparse = fxsparse.compile(Mixed().to(dtype), plan, example_inputs=x)
    sparse(x)  # moves the statistics of the norm
    monkeypatch.setattr(module, "MAX_DENSE_BYTES", 0)
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=x)
    for inputs in (x, x[:1], torch.randn(5, 3, 8, 8, dtype=dtype)):
        torch.testing.assert_close(fast(inputs).detach(), sparse.eval()(inputs).detach())
    kernels = {row["name"]: row["kernel"] for row in fast.report.layers}
    served = "cpu-csr-conv" if dtype == torch.float32 else "cpu-csr-conv-train"
    assert kernels["conv.weight"] == kernels["other.weight"] == served
    if dtype == torch.float64:
        assert kernels["first.weight"] == "cpu-csr-train", "the compiled kernels sum in fp32"
