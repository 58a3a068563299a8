"""MST: sparsity in phases, and growth by the gradient and at random together."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Method, Probe, WeightView, register
from fxsparse.options import is_number
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask
from fxsparse.rules import GradientMagnitude, PruneGrow, UniformRandom
from fxsparse.schedule import Cosine, Levels, Schedule
from fxsparse.scores import score_named


@dataclass(frozen=True)
class Mixed:
    """Grow a share of what is missing where the dense gradient is largest, then the rest anywhere."""

    share: float
    probe: ClassVar[Probe] = Probe.DENSE

    def fill(self, view: WeightView, kept: Tensor) -> Tensor:
        by_gradient = len(kept) + round(self.share * (view.nnz - len(kept)))
        grown = GradientMagnitude().fill(replace(view, nnz=by_gradient), kept)
        return UniformRandom().fill(view, grown)


@register
def mst(
    levels: tuple[float, ...] = (0.5, 0.95),
    at: tuple[int, ...] = (100, 60_000),
    restore: int = 480_000,
    stop: int = 600_000,
    every: int = 100,
    drop_fraction: float = 0.3,
    gradient_share: float = 0.75,
    init: str = "random",
) -> Method:
    """Mixed Sparsity Training: RigL whose sparsity changes in phases, and which grows a part at random: Hu et al. 2024,
    arXiv:2408.11746.

    Every weight is dense at first, has sparsity ``levels[k]`` from step ``at[k]`` on, and the plan's own from `restore`
    on; changes come with the updates, at every `every`-th step below `stop`.  Each update exchanges `drop_fraction` of
    the entries, falling along a cosine, and grows `gradient_share` of them where the dense gradient is largest, the
    rest anywhere; grown weights start at 0.  Both shares and the interval are those of the authors' code.  The paper's
    phases (warm-up, ultra-sparse, restoration) are not in that code: `levels`, `at` and `restore` are placeholders of
    GPT-2's 600,000 steps, and no saving is claimed for them.  The paper's sparse attention is left out.
    """
    if not is_number(gradient_share) or not 0 <= gradient_share <= 1:
        raise PlanError(f"expected gradient_share as a number from 0 to 1, got {gradient_share!r}.")
    if not isinstance(levels, tuple | list) or not isinstance(at, tuple | list) or len(levels) != len(at):
        raise PlanError(f"expected levels and at as tuples of one length, got {levels!r} and {at!r}.")
    ramp = Levels((*zip(at, levels, strict=True), (restore, None)))
    schedule = Schedule(every, stop, start=every, drop_fraction=Cosine(drop_fraction, stop), ramp=ramp)
    if (restore + every - 1) // every * every >= stop:
        raise PlanError(
            f"expected an update between restore and stop, so that training ends on the plan's count, got {restore} "
            f"and {stop} with one every {every} steps."
        )
    return Method(
        name="mst",
        reparam=HardMask(),
        init=score_named(init),
        rule=PruneGrow(Mixed(float(gradient_share))),
        schedule=schedule,
        source="arXiv:2408.11746",
        pattern=Unstructured(),
        allocation="er",
    )
