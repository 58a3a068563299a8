"""Put the mask between every masked weight and the ops that read it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse.errors import PlanError, UnsupportedError
from fxsparse.graph import attribute_nodes, owner
from fxsparse.initial import BEFORE_TRAINING, initial_mask, initial_values, note_drawn
from fxsparse.method import Extra, extras_of
from fxsparse.pipeline import PassContext
from fxsparse.rng import generator_for
from fxsparse.soft_masks import SoftMask
from fxsparse.storage import MaskedWeight


@dataclass(frozen=True)
class InsertReparam:
    """w becomes reparam(w, w_mask) for all its users, tied ones too; the mask is drawn and registered beside w.

    Zeroes pruned entries of the user's Parameter in place where the method keeps exact zeros, and draws the active ones
    anew where it says so.

    Raises:
        PlanError: the user's module has something under a name of the method's tensors already.
        UnsupportedError: a weight that is stored [in, out], where the method computes with rows.
    """

    name: ClassVar[str] = "insert-reparam"
    after: ClassVar[tuple[str, ...]] = ("choose-storage",)
    preserves_function: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        assert ctx.plan is not None
        method = ctx.plan.method
        function, arguments = method.reparam.function(dense_grad=False)
        rewrites = 0
        masked = [name for name, decision in ctx.decisions.items() if decision.storage == "masked"]
        note_drawn(ctx, masked)
        for name in masked:  # all of them before the first weight is changed
            _refuse_layout(ctx, name)
            _refuse_taken(ctx, name)
        names = ["mask", *(extra.name for extra in extras_of(method.reparam))]
        for name in masked:
            if name not in ctx.extended:  # by another graph of the program
                register_mask(ctx, name)
                register_extras(ctx, name)
                ctx.extended.add(name)
            for node in attribute_nodes(gm.graph, name):
                beside, last = [], node
                for extra in names:
                    with gm.graph.inserting_after(last):
                        last = gm.graph.get_attr(f"{name}_{extra}")
                    beside.append(last)
                with gm.graph.inserting_after(last):
                    effective = gm.graph.call_function(function, (node, *beside, *arguments))
                effective.meta["val"] = node.meta.get("val")
                node.replace_all_uses_with(
                    effective, delete_user_cb=lambda user, own=effective: user is not own
                )
                rewrites += 1
        return rewrites


def register_mask(ctx: PassContext, name: str) -> None:
    """Draw the mask of a weight and register it as the buffer ``<weight>_mask``."""
    module, leaf = owner(ctx.program.skeleton, name)
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


@torch.no_grad()
def register_extras(ctx: PassContext, name: str) -> None:
    """Register the method's tensors beside a weight: Parameters where they are learned, else buffers."""
    assert ctx.plan is not None
    module, leaf = owner(ctx.program.skeleton, name)
    parameter = module._parameters[leaf]
    assert parameter is not None
    if ctx.plan.method.freezes_weights:
        parameter.requires_grad_(False)
    for extra in ctx.plan.method.extras:
        own = f"{leaf}_{extra.name}"
        value = _first_value(ctx, name, extra, parameter.detach(), module._buffers[f"{leaf}_mask"])
        if extra.learned:
            module.register_parameter(own, nn.Parameter(value))
        else:
            module.register_buffer(own, value)


def _first_value(ctx: PassContext, name: str, extra: Extra, weight: Tensor, mask: Tensor | None) -> Tensor:
    assert ctx.plan is not None
    assert mask is not None
    if ctx.state is not None:
        return ctx.state[f"{name}_{extra.name}"].clone()
    generator = generator_for(ctx.plan.seed, f"{name} {extra.name}", BEFORE_TRAINING)
    return extra.start(weight, mask, generator).to(weight.device)


def _refuse_taken(ctx: PassContext, name: str) -> None:
    """PlanError where the user's module has something under a name that the method needs beside a weight."""
    assert ctx.plan is not None
    if name in ctx.extended:
        return
    module, leaf = owner(ctx.program.skeleton, name)
    method = ctx.plan.method
    soft = ["soft"] if isinstance(method.reparam, SoftMask) else []
    for own in (f"{leaf}_{kept}" for kept in ["mask", *soft, *(extra.name for extra in method.extras)]):
        if hasattr(module, own):
            raise PlanError(
                f"{method.name} keeps a tensor beside {name!r} as {own!r}: expected that name to be free, and "
                f"{type(module).__name__} has an attribute {own!r} already. Rename that one, or exclude {name!r}."
            )


def _refuse_layout(ctx: PassContext, name: str) -> None:
    assert ctx.plan is not None
    if getattr(ctx.plan.method.reparam, "by_rows", False) and ctx.weights[name].transposed:
        raise UnsupportedError(
            f"{name!r} is stored [in, out], and {ctx.plan.method.name} computes with rows of [out, in]: expected "
            "weights of nn.Linear or a convolution. Exclude this one, or use another method."
        )
