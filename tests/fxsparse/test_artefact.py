"""An inference module copies, pickles, moves and loads like any module."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse import SparseModule, choosing, inference, kernel
from fxsparse.choosing import Choice
from fxsparse.errors import CheckpointError
from fxsparse.graph import fetch
from fxsparse.graph_pickle import picklable, restored
from fxsparse.inference import Speed


class Net(nn.Module):
    """A tied pair, a shared buffer that no state dict holds, and plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.randn(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.a(x) + self.shift)))


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> SparseModule:
    def choose(problem, x, weight, *rest, **options) -> Choice:
        return Choice(kernel.registered()["cpu-csr"], {"dense": 10.0, "cpu-csr": 5.0}, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))
    model = Net()
    with torch.no_grad():
        model.a.weight[:, ::2] = 0
    return fxsparse.compile(model, mode="infer", example_inputs=X)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, pickled, saved, lambda m: pickled(copy.deepcopy(pickled(m)))]
)
def test_copies_give_the_same_numbers_and_are_independent(fast: SparseModule, again: Any) -> None:
    want = fast(X)
    other = again(fast)
    assert torch.equal(other(X), want)
    assert list(other.state_dict()) == list(fast.state_dict())
    assert other.report.to_dict() == fast.report.to_dict()
    assert other.forward_graph.code == fast.forward_graph.code
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert torch.equal(fast(X), want)


def test_a_pickle_measures_and_traces_nothing(fast: SparseModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "choose", lambda *call, **options: pytest.fail("measured"))
    monkeypatch.setattr(inference, "capture", lambda *call, **options: pytest.fail("traced"))
    assert torch.equal(pickled(fast)(X), fast(X))


def test_a_pickle_holds_the_weights_once(fast: SparseModule) -> None:
    small, state = len(pickle.dumps(fast)), len(pickle.dumps(fast.state_dict()))
    with torch.no_grad():
        wide = nn.Linear(512, 512)
        wide.weight[:, ::2] = 0
    large = fxsparse.compile(wide, mode="infer", example_inputs=torch.randn(1, 512))
    grown = len(pickle.dumps(large)) - small
    assert grown < 1.1 * (len(pickle.dumps(large.state_dict())) - state)


def test_the_pickle_of_a_converted_copy_keeps_dtype_and_numbers(fast: SparseModule) -> None:
    half = copy.deepcopy(fast).to(torch.bfloat16)
    assert half(X.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(pickled(half)(X.bfloat16()), half(X.bfloat16()))
    assert fast(X).dtype == torch.float32


def test_tied_weights_are_packed_once(fast: SparseModule) -> None:
    assert fetch(fast, "a.weight") is fetch(fast, "b.weight")
    assert [node.target for node in fast.forward_graph.graph.find_nodes(op="get_attr")].count(
        "a.weight.values"
    ) == 1


def test_a_state_dict_loads_back_strictly(fast: SparseModule) -> None:
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(X), fast(X))
    with pytest.raises(CheckpointError, match="this state dict does not fit the model"):
        other.load_state_dict({})


def test_ops_of_exported_graphs_pickle_by_name() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    relu = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (relu, x)))
    again = restored(pickled(picklable(graph)))
    assert str(again) == str(graph)
    assert torch.equal(torch.fx.GraphModule(nn.Module(), again)(X), X.relu() + X)


def test_a_graph_of_thousands_of_nodes_pickles() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for _ in range(3000):
        x = graph.call_function(torch.add, (x,), {"other": x})
    graph.output({"y": (x,), "z": [x]})
    again = restored(pickled(picklable(graph)))
    assert len(again.nodes) == 3002
    assert str(again) == str(graph)
    again.lint()


class Pooled(nn.Module):
    """Calls a function that torch builds in another function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.max_pool2d(x, 2).flatten(1))


def test_functions_that_have_no_module_of_their_own_pickle_by_name() -> None:
    x = torch.randn(2, 2, 4, 4)
    fast = fxsparse.compile(Pooled().eval(), mode="infer", example_inputs=x)
    graph = picklable(fast.forward_graph.graph)
    assert any(node.target is F.max_pool2d for node in restored(pickle.loads(pickle.dumps(graph))).nodes)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x), fast(x))


class Branches(nn.Module):
    """Calls an op on graphs, and a function of torch that it builds in another one."""

    def __init__(self) -> None:
        super().__init__()
        width = X.shape[1]
        self.small, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, self.small, torch.neg, (x,))
        return self.head(y) * torch.unique(x > 0).shape[0]


def test_graphs_that_call_graphs_pickle() -> None:
    fast = fxsparse.compile(Branches().eval(), mode="infer", example_inputs=X)
    again = pickled(fast)
    for x in (X.abs(), -X.abs()):
        assert torch.equal(again(x), fast(x))
