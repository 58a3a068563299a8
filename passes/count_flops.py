"""Count the FLOPs of every call site."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import GraphModule

from fxsparse.flops import FlopCount, Stored, count_program
from fxsparse.pipeline import PassContext


@dataclass(frozen=True)
class CountFlops:
    """Put ``SiteFlops`` in the ``meta["flops"]`` of every call site, and the totals in ``ctx.flops``.

    Reads values from ``meta["val"]`` and nonzeros and storage from `ctx.decisions`; rewrites nothing.  It has
    to see ops on parameters, so it runs before reparametrisations and kernels are put in; they keep the meta
    of what they replace.

    Raises:
        PlanError: an unknown convention.
    """

    convention: str = "mac2"
    name: ClassVar[str] = "count-flops"
    after: ClassVar[tuple[str, ...]] = ("infer-shapes",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if not any("val" in node.meta for node in gm.graph.nodes):
            ctx.notes.append("FLOPs are unknown without shapes")
            return 0
        stored = {
            name: Stored(
                nnz=decision.nnz,
                numel=ctx.weights[name].numel,
                compact=decision.storage == "compact",
                density=1 - decision.sparsity_target,
                settled=decision.settled,
            )
            for name, decision in ctx.decisions.items()
        }
        count = count_program(gm, stored, ctx.plan.method if ctx.plan else None, self.convention)
        ctx.notes += [f"not counted: {what}" for what in count.uncounted]
        if ctx.flops_before is not None:
            count = _against(count, ctx.flops_before)
        # Train and eval graphs differ in dropout and norms at most; the first one speaks for both.
        ctx.flops = ctx.flops or count
        return 0


def _against(count: FlopCount, before: FlopCount) -> FlopCount:
    """Dense FLOPs are those of the model as it came, with all its neurons."""
    dense = {layer.name: layer.dense for layer in before.layers}
    layers = tuple(replace(layer, dense=dense.get(layer.name, layer.dense)) for layer in count.layers)
    return replace(count, dense=before.dense, layers=layers)
