"""Build the update graph, with mask-update nodes for every weight, and the probe variants of the graphs that run."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from fxsparse.knapsack import KeepLargest
from fxsparse.method import GlobalRule, Probe
from fxsparse.passes.insert_soft_masks import NUMBERS, choosing
from fxsparse.pipeline import PassContext
from fxsparse.probe_variant import probe_graphs
from fxsparse.skeleton import bind
from fxsparse.soft_masks import SoftMask
from fxsparse.soft_updates import keep_largest
from fxsparse.update_mask import choose_together, move_mask, propose, update_mask, update_together


@dataclass(frozen=True)
class InsertMaskUpdates:
    """Emit ``program.graphs["update"]`` and, where the rule needs gradients, ``["probe"]`` and ``["probe_eval"]``.

    The step count and the seed become the buffers ``fxsparse_step`` and ``fxsparse_rng``.  The nodes live outside the
    forward graph: a mutating node in it runs twice under activation checkpointing.
    """

    name: ClassVar[str] = "insert-mask-updates"
    after: ClassVar[tuple[str, ...]] = ("insert-reparam", "insert-soft-masks", "lower-kernels")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        assert ctx.plan is not None
        graphs, method = ctx.program.graphs, ctx.plan.method
        if gm is not graphs["train"]:
            return 0
        ctx.program.skeleton.register_buffer("fxsparse_step", torch.zeros((), dtype=torch.int64))
        ctx.program.skeleton.register_buffer("fxsparse_rng", torch.tensor(ctx.plan.seed))
        moving = ctx.decisions if method.rule is not None else {}
        graphs["update"] = bind(_update_graph(ctx, list(moving)), ctx.program.skeleton)
        if method.rule is not None and method.rule.probe.collects:
            switch = ctx.program.switch
            graphs |= probe_graphs(graphs, method, switch, ctx.program.skeleton)
            if method.rule.probe is Probe.GUIDED:
                ctx.notes += [_unguided(name) for name in moving if not switch.keys(name)]
        return len(moving)


def _unguided(name: str) -> str:
    return f"{name}: sampled uniformly, as something else than linear ops and convolutions reads it"


def _update_graph(ctx: PassContext, names: list[str]) -> Graph:
    """Every weight by itself; or proposals, one choice among all of them, and the moves that follow from it."""
    assert ctx.plan is not None
    graph = Graph()
    step = graph.placeholder("step")
    largest = isinstance(ctx.plan.method.rule, KeepLargest)
    stored = [_stored(ctx, graph, name) for name in (choosing(ctx) if largest else names)]
    if largest and stored:
        softened = [_softened(graph, ctx, *weight) for weight in stored]
        graph.output(graph.call_function(keep_largest, (step, graph.get_attr(NUMBERS), softened)))
        return graph
    if isinstance(ctx.plan.method.rule, GlobalRule) and stored:
        graph.output((graph.call_function(update_together, (step, stored)),))
        return graph
    if ctx.plan.method.is_joint and stored:
        proposals = tuple(graph.call_function(propose, (step, *weight)) for weight in stored)
        chosen = graph.call_function(choose_together, (step, proposals))
        moved = [graph.call_function(move_mask, (step, *weight, chosen)) for weight in stored]
    else:
        moved = [graph.call_function(update_mask, (step, *weight)) for weight in stored]
    graph.output(tuple(moved))
    return graph


def _softened(
    graph: Graph, ctx: PassContext, weight: Node, mask: Node | None, name: str
) -> tuple[Node, Node | None, Node | None, str]:
    assert ctx.plan is not None
    soft = graph.get_attr(f"{name}_soft") if isinstance(ctx.plan.method.reparam, SoftMask) else None
    return weight, mask, soft, name


def _stored(ctx: PassContext, graph: Graph, name: str) -> tuple[Any, ...]:
    """What a node of the update graph is told of a weight: the weight, its mask, its name, and extras if there are."""
    assert ctx.plan is not None
    masked = ctx.decisions[name].storage == "masked"
    known = (graph.get_attr(name), graph.get_attr(f"{name}_mask") if masked else None, name)
    extras = {extra.name: graph.get_attr(f"{name}_{extra.name}") for extra in ctx.plan.method.extras}
    return (*known, extras) if extras else known
