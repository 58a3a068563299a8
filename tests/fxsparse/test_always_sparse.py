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
from fxsparse import Plan
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
                size = max(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
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


def test_inference_refuses_to_make_dense_what_does_not_fit() -> None:
    with torch.device("meta"):
        model = nn.Linear(2**16, 2**16, bias=False)
    plan = Plan(sparsity=1 - 2**-20, method=static("random"), storage="compact")
    sparse = fxsparse.compile(model, plan, example_inputs=torch.zeros(1, 2**16))
    with pytest.raises(fxsparse.FxSparseError, match=r"here 17,179,869,184 bytes, more .* sparse.eval\(\)"):
        fxsparse.compile(sparse, mode="infer")
    with torch.no_grad():
        assert sparse.eval()(torch.ones(1, 2**16)).count_nonzero() > 0
