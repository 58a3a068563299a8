"""Give the parameters and buffers of a model on the meta device their memory and their first values."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fxsparse import module
from fxsparse.creation import create_tensors, take_tensors
from fxsparse.errors import PlanError
from fxsparse.inputs import has_meta
from fxsparse.passes.choose_storage import dense_bytes, listed
from fxsparse.pipeline import PassContext
from fxsparse.scores import random


@dataclass(frozen=True)
class CreateParameters:
    """Every tensor on meta gets memory on ``ctx.device`` in the skeleton; compact weights stay for `LowerKernels`.

    So a compact weight is created at the size of its nonzeros.  How its values are drawn is left in ``ctx.draws``; a
    module that is built again takes its values from ``ctx.state``.
    Weights that are created dense are noted with their reason.  The user's own model stays on meta.

    Raises:
        PlanError: a first mask that reads dense weights, a tensor of which nobody knows the first values, or weights
            above ``module.MAX_DENSE_BYTES`` together that would be dense although the plan does not say so.
    """

    name: ClassVar[str] = "create-parameters"
    after: ClassVar[tuple[str, ...]] = ("choose-storage",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Changes no graph, so it returns 0."""
        skeleton = ctx.program.skeleton
        if ctx.draws or not has_meta(skeleton):
            return 0
        assert ctx.plan is not None
        meta = [name for name, parameter in skeleton.named_parameters() if parameter.is_meta]
        compact = [
            name for name in meta if name in ctx.decisions and ctx.decisions[name].storage == "compact"
        ]
        if ctx.state is not None:
            take_tensors(skeleton, ctx.state, compact)
            return 0
        _check_drawn(ctx, compact)
        _check_fits(ctx, [name for name in meta if name in ctx.decisions and name not in compact])
        ctx.draws.update(create_tensors(skeleton, ctx.device, ctx.plan.seed, compact))
        ctx.notes.append(
            f"created on {ctx.device}: {len(compact)} weights compact, {len(meta) - len(compact)} other parameters "
            "dense, with the values of reset_parameters() of their modules"
        )
        for name in (name for name in meta if name not in compact):
            row = ctx.weights.get(name) or ctx.excluded.get(name)
            if row is not None:
                why = ctx.decisions[name].reason if name in ctx.decisions else ctx.untouched[name]
                ctx.notes.append(f"{name} {list(row.shape)} is created dense: {why}")
        return 0


def _check_drawn(ctx: PassContext, compact: list[str]) -> None:
    assert ctx.plan is not None
    method = ctx.plan.method
    if compact and method.init is not random:
        raise PlanError(
            f"weight {compact[0]!r} is on meta and would be created compact, but {method.name} draws its first mask by "
            f"{getattr(method.init, '__name__', method.init)}, which reads a dense weight. Use a random first mask "
            f"({method.name} with score or init 'random'), storage='masked', or create the model on a real device."
        )


def _check_fits(ctx: PassContext, dense: list[str]) -> None:
    """A model on meta may be far larger than memory, so its dense weights must not come unasked."""
    assert ctx.plan is not None
    needed = sum(dense_bytes(ctx, name) for name in dense)
    if ctx.plan.storage != "masked" and needed > module.MAX_DENSE_BYTES:
        raise PlanError(
            f"this model is on meta and expected to be created compact, but {len(dense)} of its weights would be dense "
            f"under a mask, {needed:,} bytes, more than {module.MAX_DENSE_BYTES:,}: {listed(ctx, dense)}. Remove the "
            "reasons, create these modules on a real device, or ask for it with storage='masked'."
        )
