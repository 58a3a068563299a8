"""Build the update graph, with one mask-update node per weight, and the probe variant of the training graph."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule

from fxsparse.method import Probe
from fxsparse.pipeline import PassContext
from fxsparse.skeleton import bind
from fxsparse.update_mask import probe_variant, update_mask


@dataclass(frozen=True)
class InsertMaskUpdates:
    """Emit ``program.graphs["update"]`` and, where the rule needs dense gradients, ``["probe"]``.

    The step count and the seed become the buffers ``fxsparse_step`` and ``fxsparse_rng``.  The nodes live outside the
    forward graph: a mutating node in it runs twice under activation checkpointing.
    """

    name: ClassVar[str] = "insert-mask-updates"
    after: ClassVar[tuple[str, ...]] = ("insert-reparam", "lower-kernels")
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
        if method.rule is not None and method.rule.probe is Probe.DENSE:
            skeleton = ctx.program.skeleton
            graphs["probe"] = bind(probe_variant(gm.graph, skeleton, method.reparam), skeleton)
        return len(moving)


def _update_graph(ctx: PassContext, names: list[str]) -> Graph:
    graph = Graph()
    step = graph.placeholder("step")
    moved = []
    for name in names:
        masked = ctx.decisions[name].storage == "masked"
        weight = graph.get_attr(name)
        mask = graph.get_attr(f"{name}_mask") if masked else None
        moved.append(graph.call_function(update_mask, (step, weight, mask, name)))
    graph.output(tuple(moved))
    return graph
