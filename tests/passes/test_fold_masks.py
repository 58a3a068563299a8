"""A training module's evaluation graph becomes ops on plain weights, whatever training held."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan, SparseModule
from fxsparse.graph import fetch
from fxsparse.methods import set_, sr_ste
from fxsparse.passes import FoldMasks
from fxsparse.pattern import NM
from fxsparse.pipeline import PassContext, Program, run_passes
from fxsparse.report import Report
from fxsparse.skeleton import bind, copy_structure
from fxsparse.trace import capture


def compiled(**options) -> SparseModule:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    plan = Plan(**{"sparsity": 0.5, "method": set_(every=2, stop=9), **options})
    return fxsparse.compile(model, plan, example_inputs=torch.randn(2, 16))


def folded(sparse: SparseModule) -> PassContext:
    skeleton = copy_structure(sparse._emitted.program.skeleton).eval()
    graph = bind(copy.deepcopy(sparse._emitted.program.graphs["eval"].graph), skeleton)
    program = Program("symbolic", skeleton, {"eval": graph})
    ctx = PassContext(sparse.plan, "infer", program, Report(), torch.randn(2, 16))
    run_passes([FoldMasks()], ctx)  # the runner compares the outputs
    return ctx


def calls(gm: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("storage", "before"), [("masked", "fxsparse_reparam_hard_mask"), ("compact", "csr_train")]
)
def test_shows_the_graph_before_and_after(storage: str, before: str) -> None:
    sparse = compiled(storage=storage).eval()
    assert sparse.forward_graph.code.count(f"{before}(") == 2
    ctx = folded(sparse)
    gm = ctx.program.graphs["eval"]
    assert ctx.report.passes[0]["rewrites"] == 2
    assert calls(gm) == [F.linear, F.linear]
    names = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_weights_are_the_effective_ones_and_training_keeps_its_own(storage: str) -> None:
    sparse = compiled(storage=storage)
    state = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    tree = folded(sparse).program.skeleton
    dense = sparse.dense_state_dict()
    assert sorted(name for name, _ in tree.named_parameters()) == sorted(dense)
    assert [name for name, _ in tree.named_buffers()] == ["fxsparse_step", "fxsparse_rng"]  # no masks
    assert all(torch.equal(fetch(tree, name), tensor) for name, tensor in dense.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in sparse.state_dict().items())


def test_values_behind_the_mask_do_not_come_back() -> None:
    sparse = compiled(method=sr_ste(), pattern=NM(2, 4), storage="masked", allocation="uniform")
    assert int((dict(sparse.named_parameters())["0.weight"] != 0).sum()) == 16 * 8  # hidden values are kept
    assert int((fetch(folded(sparse).program.skeleton, "0.weight") != 0).sum()) == 16 * 4


def test_tied_weights_are_folded_once_under_both_names() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    plan = Plan(sparsity=0.5, storage="masked")
    sparse = fxsparse.compile(model, plan, example_inputs=torch.randn(2, 8))
    skeleton = copy_structure(sparse._emitted.program.skeleton).eval()
    graph = bind(copy.deepcopy(sparse._emitted.program.graphs["eval"].graph), skeleton)
    program = Program("symbolic", skeleton, {"eval": graph})
    run_passes([FoldMasks()], PassContext(plan, "infer", program, Report(), torch.randn(2, 8)))
    assert fetch(skeleton, "0.weight") is fetch(skeleton, "2.weight")


def test_a_model_that_is_no_training_module_is_left_alone() -> None:
    sparse = compiled()
    program = Program("symbolic", copy_structure(sparse.to_dense()), dict(folded(sparse).program.graphs))
    ctx = PassContext(None, "infer", program, Report())
    run_passes([FoldMasks()], ctx)
    assert ctx.report.passes[0]["rewrites"] == 0


class ByHand(nn.Module):
    """A linear layer whose weight its forward multiplies by a buffer."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.randn(8, 16)), kind
        self.register_buffer("mask", (torch.rand(1 if kind == "one row" else 8, 16) > 0.5).float())
        self.table = nn.Embedding(8, 16)
        if kind == "tied":
            self.table.weight = self.weight
        if kind == "double":
            self.mask = self.mask.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.mask * self.weight if self.kind == "one row" else torch.mul(self.weight, self.mask)
        y = F.linear(x, weight.float())
        if self.kind == "written":
            self.mask.mul_(0.5)
        if self.kind == "read twice":
            y = y + self.weight.sum()
        return y + self.table(torch.arange(8)).sum()


def by_hand(kind: str) -> tuple[PassContext, ByHand]:
    model, x = ByHand(kind).eval(), torch.randn(2, 16)
    program = capture(model, x, modes=("eval",))
    assert program.tier == "symbolic"
    ctx = PassContext(None, "infer", program, Report(), x)
    run_passes([FoldMasks()], ctx)  # the runner compares the outputs
    return ctx, model


@pytest.mark.parametrize("kind", ["plain", "one row"])
def test_a_mask_written_by_hand_is_folded(kind: str) -> None:
    ctx, model = by_hand(kind)
    assert ctx.report.passes[0]["rewrites"] == 1
    assert "mask" not in ctx.program.skeleton.state_dict()
    assert torch.equal(fetch(ctx.program.skeleton, "weight"), model.weight * model.mask)
    assert (model.weight != 0).all()


@pytest.mark.parametrize("kind", ["written", "read twice", "tied", "double"])
def test_a_product_with_a_buffer_stays_where_it_is_no_constant_or_somebody_else_reads(kind: str) -> None:
    ctx, model = by_hand(kind)
    assert ctx.report.passes[0]["rewrites"] == 0
    assert fetch(ctx.program.skeleton, "weight") is model.weight
