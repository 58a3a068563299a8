"""``options={"plan": ...}``: one set of masks for all graphs of a model, whose Parameters keep their values."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.backend import entry, planned
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


class Block(nn.Module):  # torch 2.11 compiles no nn.Sequential in place
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own look at what a block before it gives
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_blocks_that_share_a_graph_have_masks_of_their_own(mode, dynamic):
    model, plan = Blocks(), Plan(sparsity=0.8, exclude=("b",))
    pruned = [fxsparse.prune(block, plan, example_inputs=(X,)) for block in model.blocks]
    expected = X
    for block in pruned:
        expected = block(expected)
    for block in model.blocks:
        block.compile(backend=backend, options={"mode": mode, "plan": plan}, dynamic=dynamic)
    for _ in range(3):
        torch.testing.assert_close(model(X), expected.detach() if mode == "infer" else expected)
    if mode == "train":
        model(X).sum().backward()
        for block, other in zip(model.blocks, pruned, strict=True):
            grad = block.a.weight.grad
            assert torch.equal(grad != 0, (other.a.weight != 0) & (grad != 0))
            assert bool((grad != 0).any())
    assert len(entry.reports()) == (
        3 if mode == "infer" else 2
    )  # only later blocks have inputs with gradients


def test_a_copy_with_other_weights_is_pruned_by_its_own_masks_which_die_with_it(dense):
    options = {"mode": "train", "plan": PLAN}
    compiled = torch.compile(dense, backend=backend, options=options)
    expected = compiled(X)
    other = copy.deepcopy(dense)
    other[0].reset_parameters()
    pruned = fxsparse.prune(other, PLAN, example_inputs=(X,))
    twin = torch.compile(other, backend=backend, options=options)
    torch.testing.assert_close(twin(X), pruned(X))
    torch.testing.assert_close(compiled(X), expected)
    torch.testing.assert_close(twin(X), pruned(X))
    known = planned._MASKS[repr(PLAN.to_dict())]
    gc.collect()
    before, weight = len(known), weakref.ref(other[0].weight)
    del other, twin, pruned
    gc.collect()
    assert weight() is None
    assert len(known) == before - 2


def test_globs_that_name_nothing_in_a_graph_are_noted(dense):
    plan = Plan(sparsity=0.8, exclude=("nosuch", "2"))
    with torch.no_grad():
        torch.compile(dense, backend=backend, options={"plan": plan})(X)
    notes = [note for note in entry.reports()[0].notes if "glob" in note]
    assert len(notes) == 1
    assert "glob 'nosuch' names nothing in this graph, which has 0.weight" in notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": Plan(sparsity=0.9, method=rigl())}, "the method rigl, which moves masks"),
        ({"plan": "rigl-90"}, r"write Plan\(sparsity=0.9\) or 'static-90'"),
        ({"plan": "2:4"}, r"write Plan\(pattern=NM\(2, 4\)\)"),
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
    assert read_options(None, {"mode": None}).mode == "auto"
    with pytest.raises(PlanError, match="expected mode in"):
        read_options("infer", None)
