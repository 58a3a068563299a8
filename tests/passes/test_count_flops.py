import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import symbolic_trace
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxsparse.methods import static
from fxsparse.passes import CountFlops
from fxsparse.pattern import Unstructured
from fxsparse.pipeline import Decision, PassContext, Program, WeightSpec
from fxsparse.plans import Plan
from fxsparse.report import Report


def context(model, x):
    gm = symbolic_trace(model)
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    plan = Plan(sparsity=0.9, pattern=Unstructured(), method=static())
    ctx = PassContext(plan, "train", Program("symbolic", model, {"train": gm}), Report())
    return gm, ctx


def test_decisions_are_counted_and_the_graph_is_left_alone():
    gm, ctx = context(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)), torch.zeros(4, 10))
    for i, storage in enumerate(("masked", "compact")):
        ctx.weights[f"{i}.weight"] = WeightSpec(f"{i}.weight", "linear", (10, 10), torch.float32)
        ctx.decisions[f"{i}.weight"] = Decision(Unstructured(), 0.9, 10, storage)
    before = gm.code
    assert CountFlops().run(gm, ctx) == 0
    assert gm.code == before
    assert ctx.flops is not None
    assert (ctx.flops.dense, ctx.flops.total, ctx.flops.executed) == (400, 40, 220)
    assert ctx.flops.train_ratio == 0.1
    assert ["flops" in node.meta for node in gm.graph.nodes] == [False, True, True, False]


def test_what_cannot_be_counted_is_noted():
    gm, ctx = context(nn.Sequential(nn.LSTM(4, 4)), torch.zeros(2, 5, 4))
    CountFlops().run(gm, ctx)
    assert ctx.notes == ["not counted: 0: a LSTM is called as a whole"]


def test_nothing_is_known_without_shapes():
    gm, ctx = context(nn.Sequential(nn.Linear(4, 4)), torch.zeros(2, 4))
    for node in gm.graph.nodes:
        node.meta.clear()
    CountFlops().run(gm, ctx)
    assert ctx.flops is None
    assert ctx.notes == ["FLOPs are unknown without shapes"]


def test_the_convention_is_an_option():
    gm, ctx = context(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 2, 2))
    CountFlops(convention="rigl").run(gm, ctx)
    assert ctx.flops is not None
    assert ctx.flops.dense == 2 * 4 * 12 + 16
