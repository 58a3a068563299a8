"""Let masks that share a budget know of it: Spartan's soft masks, and dual averaging's."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.errors import PlanError
from fxsparse.graph import owner
from fxsparse.knapsack import KeepLargest, block_of
from fxsparse.pipeline import PassContext
from fxsparse.soft_masks import AveragedMask, SoftMask, averaged_mask, shared_shift, soft_mask
from fxsparse.soft_updates import shared

NUMBERS = "fxsparse_budgets"


@dataclass(frozen=True)
class InsertSoftMasks:
    """soft_mask(w, w_mask) becomes soft_mask(w, w_mask, w_soft, numbers, shift); shift depends on all of a budget.

    averaged_mask(w, w_mask) gets the numbers alone.  Those of all budgets are the buffer ``fxsparse_budgets``, and the
    soft mask is the buffer ``<weight>_soft``: ones, until the first step.

    Raises:
        PlanError: the model runs by its own forward.
    """

    name: ClassVar[str] = "insert-soft-masks"
    after: ClassVar[tuple[str, ...]] = ("insert-reparam",)
    preserves_function: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        assert ctx.plan is not None
        method = ctx.plan.method
        if not isinstance(method.rule, KeepLargest):
            return 0
        names = choosing(ctx)
        if not names:
            return 0
        groups = shared(method.rule, names)
        _register_numbers(ctx, len(groups))
        if ctx.program.tier == "walk" and isinstance(method.reparam, SoftMask | AveragedMask):
            raise PlanError(
                f"{method.name} looks at all weights at once, which takes a graph of the model, and none could be "
                "captured: expected a model that torch.fx or torch.export can trace (the error of fxsparse.compile "
                "with strict=True says why this one is not). gmp needs no graph."
            )
        if not isinstance(method.reparam, SoftMask | AveragedMask):
            return 0
        start = next(node for node in gm.graph.nodes if node.op != "placeholder")
        with gm.graph.inserting_before(start):
            every = gm.graph.get_attr(NUMBERS)
            numbers = [
                gm.graph.call_function(operator.getitem, (every, place)) for place in range(len(groups))
            ]
        rewrite = _soften if isinstance(method.reparam, SoftMask) else _average
        return sum(rewrite(gm, ctx, group, own, start) for group, own in zip(groups, numbers, strict=True))


def choosing(ctx: PassContext) -> list[str]:
    """The weights whose entries compete: those that no override keeps dense."""
    return [name for name, decision in ctx.decisions.items() if not decision.dense]


def _average(gm: GraphModule, ctx: PassContext, names: Sequence[str], numbers: Node, start: Node) -> int:
    found = _effective(gm, names, averaged_mask)
    for node in found:
        node.args = (*node.args[:2], numbers)
    return len(found)


def _soften(gm: GraphModule, ctx: PassContext, names: Sequence[str], numbers: Node, start: Node) -> int:
    blocks = {name: block_of(ctx.decisions[name].pattern, ctx.weights[name].transposed) for name in names}
    costs = {name: ctx.decisions[name].cost * rows * columns for name, (rows, columns) in blocks.items()}
    with gm.graph.inserting_before(start):
        weights = [gm.graph.get_attr(name) for name in names]
        parts = (weights, [blocks[name] for name in names], [costs[name] for name in names])
        shift = gm.graph.call_function(shared_shift, (numbers, *parts))
    found = _effective(gm, names, soft_mask)
    for node in found:
        name = _weight(node)
        _register_soft(ctx, name)
        with gm.graph.inserting_before(node):
            soft = gm.graph.get_attr(f"{name}_soft")
        node.args = (*node.args[:2], soft, numbers, shift, blocks[name], costs[name])
    return len(found)


def _effective(gm: GraphModule, names: Sequence[str], function: Callable[..., Tensor]) -> list[Node]:
    """The calls of a reparametrisation on these weights."""
    found = gm.graph.find_nodes(op="call_function", target=function)
    return [node for node in found if _weight(node) in names]


def _weight(node: Node) -> str:
    read = node.args[0]
    assert isinstance(read, Node)
    return str(read.target)


def _register_numbers(ctx: PassContext, budgets: int) -> None:
    skeleton = ctx.program.skeleton
    if NUMBERS not in skeleton._buffers:
        start = (
            torch.zeros(budgets, 3, dtype=torch.float64) if ctx.state is None else ctx.state[NUMBERS].clone()
        )
        skeleton.register_buffer(NUMBERS, start)


def _register_soft(ctx: PassContext, name: str) -> None:
    module, leaf = owner(ctx.program.skeleton, name)
    if f"{leaf}_soft" in module._buffers:
        return
    weight = module._parameters[leaf]
    assert weight is not None
    start = torch.ones_like(weight.detach()) if ctx.state is None else ctx.state[f"{name}_soft"].clone()
    module.register_buffer(f"{leaf}_soft", start)
