"""A model that is its graphs: modes, copies and pickles."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fxsparse import Plan
from fxsparse.skeleton import copy_structure
from fxsparse.trace import capture
from fxsparse.transformation import transform
from fxsparse.transforms import SparseWide


@pytest.fixture
def model():
    layers = (
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 8),
        nn.Dropout(0.5),
        nn.Linear(8, 8),
        nn.Linear(8, 2),
    )
    return transform(nn.Sequential(*layers), Plan(transform=SparseWide(), sparsity=0.75), torch.randn(6, 4))


X = torch.randn(6, 4)


def test_it_runs_in_both_modes(model):
    assert torch.equal(model.eval()(X), model(X))
    assert not torch.equal(model.train()(X), model(X))
    before = model.get_buffer("1.running_mean").clone()
    model(X)
    assert not torch.equal(model.get_buffer("1.running_mean"), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_tensors_of_their_own(model, copied):
    want = model.eval()(X)
    other = copied(model)
    assert torch.equal(other(X), want)
    with torch.no_grad():
        other.get_parameter("0.weight").zero_()
    assert torch.equal(model(X), want)
    assert other.origin == model.origin


def test_a_structural_copy_runs_on_its_own_tree(model):
    want = model.eval()(X)
    other = copy_structure(model)
    other._modules["0"]._parameters["weight"] = nn.Parameter(torch.zeros(16, 4))
    assert not torch.equal(other(X), want)
    assert torch.equal(model(X), want)


def test_its_capture_is_its_graphs(model):
    program = capture(model, X, modes=("eval",))
    assert list(program.graphs) == ["eval"]
    assert program.skeleton.get_parameter("0.weight") is model.get_parameter("0.weight")
    assert torch.equal(program.run("eval", X), model.eval()(X))
    assert program.dense["0.weight"].endswith("it reads the model's input")
    program.graphs["eval"].graph.erase_node(next(iter(reversed(program.graphs["eval"].graph.nodes))))
    assert torch.equal(capture(model, X).run("eval", X), model.eval()(X))  # another program is as it was
