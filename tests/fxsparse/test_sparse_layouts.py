"""Tensors in PyTorch's own sparse layouts, such as the adjacency of a graph network."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import CheckpointError, UnsupportedError
from fxsparse.methods import static

LAYOUTS = ("to_sparse_coo", "to_sparse_csr", "to_sparse_csc")
X = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
EDGES = (torch.rand(20, 20, generator=torch.Generator().manual_seed(1)) < 0.2).float()
PLAN = Plan(sparsity=0.5, method=static())

# What PyTorch says of these layouts.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support", "ignore:Sparse CSC tensor support"
)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, edges):
        return self.last(torch.sparse.mm(edges, self.first(x)).relu())


class Held(Network):
    def __init__(self, persistent=True):
        super().__init__()
        self.register_buffer("edges", EDGES.to_sparse_coo(), persistent=persistent)

    def forward(self, x):
        return super().forward(x, self.edges)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_input_may_be_sparse(layout):
    inputs = (X, getattr(EDGES, layout)())
    sparse = fxsparse.compile(Network(), PLAN, example_inputs=inputs)
    sparse(*inputs).sum().backward()
    assert {row["name"] for row in sparse.report.layers} == {"first.weight", "last.weight"}
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=inputs)
    torch.testing.assert_close(fast(*inputs), sparse.to_dense()(*inputs))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_may_be_sparse(persistent, tmp_path):
    sparse = fxsparse.compile(Held(persistent), PLAN, example_inputs=X)
    sparse(X).sum().backward()
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=X)
    torch.testing.assert_close(fast(X), sparse.to_dense()(X))
    for compiled in (sparse, fast):
        for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
            assert torch.equal(other(X), compiled(X))
        with pytest.raises(CheckpointError):
            fxsparse.save(compiled, tmp_path / "file")
    with pytest.raises(
        CheckpointError, match=r"edges' is in torch.sparse_coo, and a file holds strided tensors"
    ):
        fxsparse.save(sparse, tmp_path / "file")


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
def test_a_layer_of_sparse_inputs_stays_dense(layout):
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), getattr(X.relu(), layout)()
    sparse = fxsparse.compile(model, PLAN, example_inputs=x)
    reasons = {row["name"]: row["reason"] for row in sparse.report.untouched}
    assert reasons["0.weight"].startswith("its input is of a sparse layout")
    sparse(x).sum().backward()
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), sparse.to_dense()(x))


def test_what_pytorch_cannot_copy_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse_csr())
    with pytest.raises(UnsupportedError, match=r"got '1.weight' in torch.sparse_csr: use its to_dense\(\)"):
        fxsparse.compile(model, mode="infer", example_inputs=X)
    held = Held()
    held.edges = EDGES.to_sparse_csr()
    with pytest.raises(UnsupportedError, match=r"got 'edges' in torch.sparse_csr: use its to_sparse_coo\(\)"):
        fxsparse.compile(held, PLAN, example_inputs=X)


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
def test_a_plain_attribute_may_be_sparse(layout):
    class Keeping(Network):
        def __init__(self):
            super().__init__()
            self.kept = getattr(EDGES, layout)()

        def forward(self, x):
            return super().forward(x, self.kept)

    sparse = fxsparse.compile(Keeping(), PLAN, example_inputs=X)
    sparse(X).sum().backward()
    dense = Network()
    dense.load_state_dict(sparse.dense_state_dict())
    torch.testing.assert_close(sparse(X), dense(X, EDGES.to_sparse_coo()))


def test_gradients_may_be_sparse():
    model, ids = (
        nn.Sequential(nn.Embedding(20, 16, sparse=True), nn.Linear(16, 4)),
        torch.tensor([[1, 3], [3, 7]]),
    )
    sparse = fxsparse.compile(model, PLAN, example_inputs=ids)
    sparse(ids).sum().backward()
    assert sparse.get_parameter("0.weight").grad.layout is torch.sparse_coo
