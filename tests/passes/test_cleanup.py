"""Dead code goes; what acts in place or draws random numbers stays."""

import pytest
import torch
from torch import Tensor, nn

from fxsparse.passes import Cleanup
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


class Leftovers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        torch.rand(3)
        unread = x + 1
        unread.reshape(-1)
        return self.lin(x)


@pytest.fixture
def ctx() -> PassContext:
    return PassContext(None, "train", capture(Leftovers(), torch.randn(2, 4)), Report(), torch.randn(2, 4))


def test_erases_pure_nodes_and_keeps_the_rest(ctx: PassContext) -> None:
    run_passes([Cleanup()], ctx)
    ops = [str(node.target) for node in ctx.program.graphs["eval"].graph.nodes if node.op != "placeholder"]
    assert [op.split(" ")[-1] for op in ops] == ["calls", "add_", ops[2].split(" ")[-1], "lin", "output"]
    assert "rand" in ops[2]
    assert ctx.report.passes[0]["rewrites"] == 2


def test_a_counter_counts_on(ctx: PassContext) -> None:
    run_passes([Cleanup()], ctx)
    ctx.program.run("eval", torch.randn(2, 4))
    assert ctx.program.skeleton.calls == 1


def test_random_numbers_keep_their_order(ctx: PassContext) -> None:
    x = torch.randn(2, 4)
    torch.manual_seed(3)
    ctx.program.run("eval", x)
    before = torch.rand(1)
    run_passes([Cleanup()], ctx)
    torch.manual_seed(3)
    ctx.program.run("eval", x)
    assert torch.equal(torch.rand(1), before)
