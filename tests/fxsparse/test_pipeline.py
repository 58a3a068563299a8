"""The runner orders passes, and catches those that do not do what they claim."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from fxsparse.errors import InvariantError, PlanError
from fxsparse.pipeline import PassContext, ordered, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


@dataclass(frozen=True)
class Step:
    """A pass of any name, order and effect."""

    name: str
    after: tuple[str, ...] = ()
    preserves_function: bool = True
    edit: Callable[[GraphModule], int] = lambda gm: 0

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        return self.edit(gm)


def context() -> PassContext:
    x = torch.randn(3, 4)
    return PassContext(None, "train", capture(nn.Sequential(nn.Linear(4, 4)), x), Report(), x)


def negate(gm: GraphModule) -> int:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(torch.neg, (output.args[0],)),)
    return 1


def use_before_definition(gm: GraphModule) -> int:
    nodes = list(gm.graph.nodes)
    with gm.graph.inserting_before(nodes[0]):
        gm.graph.call_function(torch.neg, (nodes[1],))
    return 1


def test_order_follows_after_and_is_otherwise_as_given() -> None:
    steps = [Step("d", ("a",)), Step("c"), Step("a"), Step("b", ("c", "a"))]
    assert [step.name for step in ordered(steps)] == ["c", "a", "d", "b"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [Step("lower-kernels", ("select-kernels",))],
            r"pass 'lower-kernels' must run after \['select-kernels'\], but \['select-kernels'\] is not in",
        ),
        ([Step("a", ("b",)), Step("b", ("a",))], "wait for each other; drop one of their `after` names"),
        ([Step("a"), Step("a")], r"every pass may be listed once; got \['a'\] more than once"),
    ],
)
def test_impossible_orders_are_named(steps: list[Step], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        run_passes(steps, context())


def test_each_pass_writes_a_row_and_stamps_its_nodes() -> None:
    ctx = context()
    run_passes([Step("flip", preserves_function=False, edit=negate)], ctx)
    (row,) = ctx.report.passes
    assert (row["name"], row["rewrites"], row["notes"]) == ("flip", 1, [])
    stamped = [node.target for node in ctx.program.graphs["eval"].graph.nodes if "from_pass" in node.meta]
    assert stamped == [torch.neg]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            Step("flip", edit=negate),
            "pass 'flip' changed the function of the eval graph: output 0 differs by",
        ),
        (
            Step("shy", preserves_function=False, edit=lambda gm: negate(gm) - 1),
            "pass 'shy' reported 0 rewrites but changed the train graph",
        ),
        (
            Step("break", preserves_function=False, edit=use_before_definition),
            "pass 'break' left a broken train graph",
        ),
    ],
)
def test_broken_promises_are_found(step: Step, message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        run_passes([step], context())


def test_a_declared_change_is_the_new_function() -> None:
    ctx = context()
    run_passes([Step("flip", preserves_function=False, edit=negate), Step("keep", ("flip",))], ctx)
    assert [row["rewrites"] for row in ctx.report.passes] == [1, 0]
