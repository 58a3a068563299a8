"""Give the parameters and buffers of a model on the meta device their memory and their first values."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fxsparse.creation import create_tensors, take_tensors
from fxsparse.inputs import has_meta
from fxsparse.pipeline import PassContext


@dataclass(frozen=True)
class CreateParameters:
    """Every tensor on meta gets memory on ``ctx.device`` in the skeleton; compact weights stay for `LowerKernels`.

    So a compact weight is created at the size of its nonzeros.  How its values are drawn is left in ``ctx.draws``; a
    module that is built again takes its values from ``ctx.state``.
    Weights that are created dense are noted with their reason.  The user's own model stays on meta.
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
