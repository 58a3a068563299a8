"""Put the mask between every masked weight and the ops that read it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from fxsparse.graph import attribute_nodes, owner
from fxsparse.initial import initial_mask, initial_values, note_drawn
from fxsparse.pipeline import PassContext
from fxsparse.storage import MaskedWeight


@dataclass(frozen=True)
class InsertReparam:
    """w becomes reparam(w, w_mask) for all its users, tied ones too; the mask is drawn and registered beside w.

    Zeroes pruned entries of the user's Parameter in place where the method keeps exact zeros, and draws the active ones
    anew where it says so.
    """

    name: ClassVar[str] = "insert-reparam"
    after: ClassVar[tuple[str, ...]] = ("choose-storage",)
    preserves_function: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        assert ctx.plan is not None
        function, arguments = ctx.plan.method.reparam.function(dense_grad=False)
        rewrites = 0
        note_drawn(ctx, [name for name, decision in ctx.decisions.items() if decision.storage == "masked"])
        for name, decision in ctx.decisions.items():
            if decision.storage != "masked":
                continue
            register_mask(ctx, name)
            for node in attribute_nodes(gm.graph, name):
                with gm.graph.inserting_after(node):
                    mask = gm.graph.get_attr(f"{name}_mask")
                with gm.graph.inserting_after(mask):
                    effective = gm.graph.call_function(function, (node, mask, *arguments))
                effective.meta["val"] = node.meta.get("val")
                node.replace_all_uses_with(
                    effective, delete_user_cb=lambda user, own=effective: user is not own
                )
                rewrites += 1
        return rewrites


def register_mask(ctx: PassContext, name: str) -> None:
    """Draw the mask of a weight, once, and register it as the buffer ``<weight>_mask``."""
    module, leaf = owner(ctx.program.skeleton, name)
    if f"{leaf}_mask" in module._buffers:
        return
    assert ctx.plan is not None
    mask = initial_mask(ctx, name)
    module.register_buffer(f"{leaf}_mask", mask)
    parameter = module._parameters[leaf]
    assert parameter is not None
    stored = MaskedWeight(parameter, mask, ctx.weights[name].transposed)
    positions = stored.active()
    values = initial_values(ctx, name, positions)
    if values is not None:
        stored.fill(positions, values)
    if ctx.plan.method.reparam.exact_zeros:
        with torch.no_grad():
            parameter.mul_(mask)
