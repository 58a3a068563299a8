"""SR-STE: N:M sparsity from scratch."""

from fxsparse.method import Method, register
from fxsparse.reparam import StraightThrough
from fxsparse.rules import LargestMagnitude
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named


@register
def sr_ste(decay: float = 2e-4) -> Method:
    """Mask by magnitude after every step, straight-through gradient: Zhou et al. 2021, arXiv:2102.04010.

    Pruned weights go on learning and are pulled to 0 by `decay`, which steadies the mask.  Made for
    ``pattern=NM(n, m)``; any pattern works.  Backward is dense at every step.
    """
    return Method(
        name="sr_ste",
        reparam=StraightThrough(decay),
        init=score_named("magnitude"),
        rule=LargestMagnitude(),
        schedule=Schedule(every=1, start=1),
        source="arXiv:2102.04010",
    )
