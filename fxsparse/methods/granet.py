"""GraNet: gradual global pruning with regrowth."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Method, Probe, WeightView, register
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask
from fxsparse.rules import GradientMagnitude, cut, magnitudes
from fxsparse.schedule import CosineTo, CubicRamp, Schedule
from fxsparse.scores import score_named
from fxsparse.selection import to_positions
from fxsparse.topk import top_positions


@dataclass(frozen=True)
class CutAndRegrow:
    """One global magnitude cut to the total, then in each weight ``ceil(r nnz)`` are exchanged by the gradient.

    Dropped by the exchange are the smallest magnitudes.  Grown are the largest gradients of what is then inactive, so
    that an entry which was dropped in this very update may be grown again, and then keeps its value and state.
    """

    probe = Probe.DENSE

    def __call__(self, view: WeightView) -> Tensor:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Tensor]:
        return [
            _exchange(view, to_positions(kept)) for view, kept in zip(views, cut(views, total), strict=True)
        ]


def _exchange(view: WeightView, active: Tensor) -> Tensor:
    count = len(active)
    drop = ceil(count * view.drop_fraction)
    kept = active[top_positions(magnitudes(view, elsewhere=0.0)[active], count - drop)]
    return GradientMagnitude().fill(replace(view, nnz=count), kept) if drop else active


@register
def granet(
    every: int = 1_000,
    start: int = 0,
    ramp: int = 43_000,
    stop: int = 62_500,
    initial_sparsity: float = 0.5,
    drop_fraction: float = 0.5,
    final_drop_fraction: float = 0.005,
    init: str = "random",
) -> Method:
    """Shrink all weights together along a cubic ramp, and exchange entries at each update: Liu et al. 2021,
    arXiv:2106.10404.

    Updates follow the optimizer's step, at every `every`-th from `start` on and below `stop`, the end of training.  The
    last one of the ramp, at step `ramp`, reaches the plan's total exactly (the authors' code stops one update before
    it); the exchange goes on, its share falling along a cosine from `drop_fraction` to `final_drop_fraction`.  The
    plan's allocation shares out `initial_sparsity` (0.5 with "erk" in the paper; 0 starts dense), magnitudes all that
    follows.  Grown weights start at 0.  The defaults are the paper's for CIFAR: 160 epochs at batch 128, ramp to 110.
    """
    decay = CosineTo(drop_fraction, final_drop_fraction, stop)
    schedule = Schedule(every, stop, start, drop_fraction=decay)
    if not isinstance(ramp, int) or (ramp - start) % every or ramp <= start:
        raise PlanError(
            f"expected ramp - start as a multiple of every above 0, got {ramp!r} - {start} and {every}: the ramp would "
            "end short of the plan's total."
        )
    if stop <= ramp:
        raise PlanError(f"expected stop, the end of training, after the ramp, got {stop} and {ramp}.")
    return Method(
        name="granet",
        reparam=HardMask(),
        init=score_named(init),
        rule=CutAndRegrow(),
        schedule=replace(schedule, ramp=CubicRamp(initial_sparsity, start, ramp)),
        source="arXiv:2106.10404",
        pattern=Unstructured(),
        initial_sparsity=initial_sparsity,
    )
