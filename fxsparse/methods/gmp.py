"""GMP: gradual magnitude pruning."""

from fxsparse.errors import PlanError
from fxsparse.method import Method, register
from fxsparse.reparam import HiddenMask
from fxsparse.rules import LargestMagnitude
from fxsparse.schedule import CubicRamp, Schedule
from fxsparse.scores import score_named


@register
def gmp(start: int = 10_000, stop: int = 25_000, every: int = 1_000, initial_sparsity: float = 0.0) -> Method:
    """Prune every weight by magnitude along a cubic ramp: Zhu and Gupta 2017, arXiv:1710.01878.

    The last update, at `stop`, reaches the plan's sparsity exactly.  Each update computes the mask anew from
    all magnitudes, as TensorFlow's model_pruning does: a pruned weight keeps its value without a gradient
    (weight decay still shrinks it) and may come back.  The defaults are RigL's paper's for ImageNet.
    """
    ramp = CubicRamp(initial_sparsity, start, stop)
    schedule = Schedule(every, stop + 1, start, ramp=ramp)
    if (stop - start) % every:
        raise PlanError(
            f"expected stop - start as a multiple of every, got {stop} - {start} and {every}: the ramp "
            f"would end short of its target. Use stop={stop - (stop - start) % every}, or another every."
        )
    return Method(
        name="gmp",
        reparam=HiddenMask(),
        init=score_named("magnitude"),
        rule=LargestMagnitude(),
        schedule=schedule,
        source="arXiv:1710.01878",
    )
