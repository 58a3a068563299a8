"""Dropout and Identity leave the evaluation graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.passes import Functionalize, RemoveIdentities
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


def removed(model: nn.Module, x: Tensor) -> tuple[int, str]:
    ctx = PassContext(None, "infer", capture(model, x, modes=("eval",)), Report(), x)
    ctx.program.skeleton.eval()
    run_passes([Functionalize(), RemoveIdentities()], ctx)
    return ctx.report.passes[1]["rewrites"], ctx.program.graphs["eval"].code


class Calls(nn.Module):
    """Dropouts as modules and as functions, on and off."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop, self.plane, self.same = nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.plane(self.drop(self.same(self.fc(x))))
        x = F.dropout(x, 0.3, self.training)
        return F.dropout(x, 0.0, True) + 1


def test_shows_the_graph_before_and_after() -> None:
    model, x = Calls(), torch.randn(2, 3, 4, 4)
    before = capture(model, x, modes=("eval",)).graphs["eval"].code
    assert "self.drop(" in before
    assert "self.same(" in before
    rewrites, code = removed(model, x)
    assert rewrites == 5
    assert "drop" not in code
    assert "same" not in code
    assert "plane" not in code


def test_keeps_a_dropout_that_is_on_in_evaluation() -> None:
    class MonteCarlo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=True)

    ctx = PassContext(None, "infer", capture(MonteCarlo(), modes=("eval",)), Report())
    run_passes([Functionalize(), RemoveIdentities()], ctx)
    assert ctx.report.passes[1]["rewrites"] == 0
    assert "dropout" in ctx.program.graphs["eval"].code


@pytest.mark.parametrize("train", [True, False])
def test_a_call_of_the_exported_op_goes_only_when_it_is_off(train: bool) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.dropout.default, (x, 0.5, train)))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    ctx = PassContext(None, "infer", capture(nn.Identity(), modes=("eval",)), Report())
    assert RemoveIdentities().run(gm, ctx) == (0 if train else 1)
