"""RigL: the rigged lottery."""

from fxsparse.errors import PlanError
from fxsparse.method import Method, register
from fxsparse.reparam import HardMask
from fxsparse.rules import GradientMagnitude, PruneGrow
from fxsparse.schedule import Schedule, decay_curve
from fxsparse.scores import score_named


@register
def rigl(
    every: int = 100,
    stop: int = 25_000,
    drop_fraction: float = 0.3,
    decay: str = "cosine",
    variant: str = "paper",
    init: str = "random",
) -> Method:
    """Prune by magnitude, grow by the dense gradient's: Evci et al. 2020, arXiv:1911.11134, Algorithm 1.

    Updates come at every `every`-th step below `stop` (three quarters of training).  ``variant="paper"``
    begins at step 0 and takes no optimizer step on an update step; ``variant="torch"``, as PyTorch ports do,
    begins at step `every` and lets the optimizer step first, with the same gradient.  Grown weights start at
    0.  In masked storage ``.grad`` is dense from an update's backward to its ``optimizer.step()``, so gradient
    clipping in between sees the pruned entries too.  `decay` of the drop fraction is "cosine", "constant",
    "linear" or "cubic" (appendix G).
    """
    if variant not in ("paper", "torch"):
        raise PlanError(f"expected variant as paper or torch, got {variant!r}.")
    paper = variant == "paper"
    return Method(
        name="rigl",
        reparam=HardMask(),
        init=score_named(init),
        rule=PruneGrow(GradientMagnitude()),
        schedule=Schedule(
            every,
            stop,
            start=0 if paper else every,
            skip_step=paper,
            drop_fraction=decay_curve(decay, drop_fraction, stop),
        ),
        source="arXiv:1911.11134",
    )
