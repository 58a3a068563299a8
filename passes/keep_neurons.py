"""Say of which weights a method may ablate whole neurons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxsparse.channels import trace_channels
from fxsparse.errors import PlanError
from fxsparse.globs import matches, unmatched
from fxsparse.graph import SITE_OPS, sites
from fxsparse.pattern import ConstantFanIn
from fxsparse.pipeline import PassContext
from fxsparse.trace.modules import is_transposed_linear, site_type

_SHAPE_METHODS = ("size", "dim", "numel")
_SHAPE_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_SHAPE_OPS = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


@dataclass(frozen=True)
class KeepNeurons:
    """Fill `ablates` and `neurons` of every decision, for a method that ablates; rewrites nothing.

    A weight keeps all its neurons where they are outputs of the model (no linear or convolution lies between its
    call and the output), where the plan gives its fan-in, and where the method's `never_ablate` names it.  The
    module walk sees no calls in order: there it is the last weight that is taken for the output.  Where one rule
    chooses for all weights, and shapes are known, `channels` says which rows are one channel.

    Raises:
        PlanError: a glob of `never_ablate` that names no selected weight.
    """

    name: ClassVar[str] = "keep-neurons"
    after: ClassVar[tuple[str, ...]] = ("allocate-nnz",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        globs = None if ctx.plan is None else ctx.plan.method.never_ablate
        if globs is None or any(decision.neurons for decision in ctx.decisions.values()):
            return 0
        lost = unmatched(globs, ctx.weights)
        if lost:
            raise PlanError(
                f"never_ablate={lost[0]!r}: expected a glob of selected weights, it names none of "
                f"{', '.join(list(ctx.weights)[:3])}, ...; check the spelling, or whether the weight is excluded."
            )
        for name, decision in ctx.decisions.items():
            reason = _reason(ctx, name, globs)
            decision.ablates = reason is None
            decision.neurons = "may be ablated" if reason is None else f"all stay: {reason}"
        assert ctx.plan is not None
        shaped = any("val" in node.meta for node in gm.graph.nodes)
        if ctx.plan.method.is_joint and ctx.program.tier != "walk" and shaped:
            _label(gm, ctx)
        return 0


def _label(gm: GraphModule, ctx: PassContext) -> None:
    """Fill `channels` of every weight with one call, which says what its rows are."""
    traced = trace_channels(gm)
    labels = traced.graph.channels()
    for name, decision in ctx.decisions.items():
        calls = sites(gm, name)
        produces = traced.steps[calls[0].node].produces if len(calls) == 1 else None
        if produces in labels and not calls[0].sliced:
            decision.channels = tuple(labels[produces].tolist())


def _reason(ctx: PassContext, name: str, globs: Sequence[str]) -> str | None:
    """Why the weight keeps all its neurons; None where it may lose some."""
    pattern = ctx.decisions[name].pattern
    if isinstance(pattern, ConstantFanIn) and pattern.fan_in is not None:
        return f"the plan gives its fan-in, {pattern.fan_in}"
    named = next((glob for glob in globs if matches(glob, name)), None)
    if named is not None:
        return f"named by never_ablate={named!r}"
    return "outputs of the model" if _is_output(ctx, name) else None


def _is_output(ctx: PassContext, name: str) -> bool:
    if ctx.program.tier == "walk":
        return name == list(ctx.weights)[-1]
    graphs = [gm for _, gm in ctx.program.distinct_graphs()]
    return any(_reaches_output(gm, site.node) for gm in graphs for site in sites(gm, name))


def _reaches_output(gm: GraphModule, start: Node) -> bool:
    """Whether the value of a call arrives at the output without another linear or convolution on the way."""
    seen, ahead = {start}, [start]
    while ahead:
        for user in ahead.pop().users:
            if user.op == "output":
                return True
            if user not in seen and not _stops(gm, user):
                seen.add(user)
                ahead.append(user)
    return False


def _stops(gm: GraphModule, node: Node) -> bool:
    """Whether a node mixes its inputs by a weight of its own, or reads a shape only."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return site_type(module) is not None or is_transposed_linear(module)
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return node.target in SITE_OPS or node.target in _SHAPE_OPS
