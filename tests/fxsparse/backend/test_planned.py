"""``options={"plan": ...}``: one set of masks for all graphs of a model, whose Parameters keep their values."""

import copy

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.backend import entry
from fxsparse.backend import fxsparse as backend
from fxsparse.backend.options import read_options
from fxsparse.errors import PlanError
from fxsparse.methods import rigl, wanda
from fxsparse.transforms import SparseWide

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
PLAN = Plan(sparsity=0.8, exclude=("2",))


@pytest.fixture
def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_a_dense_model_is_served_as_if_it_were_pruned(dense):
    before = copy.deepcopy(dense.state_dict())
    expected = fxsparse.prune(dense, PLAN, example_inputs=(X,))
    y = torch.compile(dense, backend=backend, options={"mode": "infer", "plan": PLAN})(X)
    torch.testing.assert_close(y, expected(X).detach())
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)
    report = entry.reports()[0]
    assert [row["kernel"] for row in report.layers] == ["cpu-csr", "dense"]  # the second has no zeros
    assert "keep 102 of 512 entries of 1 weights" in report.notes[0]


def test_training_keeps_the_masks_and_evaluation_after_it_has_the_same(dense):
    options = {"mode": "auto", "plan": PLAN.to_dict()}
    compiled = torch.compile(dense, backend=backend, options=options)
    mask = fxsparse.prune(dense, PLAN, example_inputs=(X,))[0].weight != 0
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(X).square().mean().backward()
        assert torch.equal(dense[0].weight.grad[~mask], torch.zeros(int((~mask).sum())))
        optimizer.step()
    expected = copy.deepcopy(dense)
    with torch.no_grad():
        expected[0].weight.mul_(mask)
        torch.testing.assert_close(compiled(X), expected(X))
        dense[0].weight.mul_(2)
        expected[0].weight.mul_(2)
        torch.testing.assert_close(compiled(X), expected(X))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        h = self.a(x)
        return self.b(h) if h.sum() < 1e9 else h


def test_globs_may_name_what_lies_behind_a_graph_break():
    model = Broken()
    plan = Plan(sparsity=0.5, exclude=("b",), overrides=(Override("a", sparsity=0.75),))
    with torch.no_grad():
        y = torch.compile(model, backend=backend, options={"plan": plan})(X)
        torch.testing.assert_close(y, fxsparse.prune(model, plan, example_inputs=(X,))(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": Plan(sparsity=0.9, method=rigl())}, "the method rigl, which moves masks"),
        ({"plan": Plan(sparsity=0.9, transform=SparseWide())}, "a transform"),
        ({"plan": Plan(sparsity=0.9, method=wanda())}, "the method wanda, which needs calibration"),
        ({"plan": 0.9}, "a preset's name, got float"),
        ({"plan": "none-90"}, "none"),
        ({"plan": "absent.toml"}, "absent.toml"),
        ({"mode": "max-autotune"}, "an Inductor mode goes to torch.compile"),
        ({"mode": "fast"}, "got 'fast'"),
        ({"max_autotun": True}, "unknown option 'max_autotun'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        read_options(None, options)


def test_modes_and_options_of_inductor_are_handed_on():
    read = read_options("max-autotune", {"mode": "infer", "plan": "static-90", "epilogue-fusion": False})
    assert read.mode == "infer"
    assert read.plan == Plan.preset("static-90")
    assert read.inductor["max_autotune"] is True
    assert read.inductor["epilogue_fusion"] is False
    with pytest.raises(PlanError, match="expected mode in"):
        read_options("infer", None)
