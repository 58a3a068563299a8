"""SET: sparse evolutionary training."""

from fxsparse.method import Method, register
from fxsparse.reparam import HardMask
from fxsparse.rules import PruneGrow, UniformRandom
from fxsparse.schedule import Schedule, decay_curve
from fxsparse.scores import score_named


@register
def set_(
    every: int = 390,
    stop: int | None = None,
    drop_fraction: float = 0.3,
    decay: str = "constant",
    init: str = "random",
) -> Method:
    """Prune by magnitude and grow at random, at the end of every epoch: Mocanu et al. 2018, arXiv:1707.04780.

    The optimizer steps first, then the masks move.  `every` is the number of steps in an epoch (390: CIFAR-10
    at batch 128).  The SET of RigL's paper is ``set_(every=100, stop=25_000, decay="cosine")``.
    """
    return Method(
        name="set",
        reparam=HardMask(),
        init=score_named(init),
        rule=PruneGrow(UniformRandom()),
        schedule=Schedule(every, stop, start=every, drop_fraction=decay_curve(decay, drop_fraction, stop)),
        source="arXiv:1707.04780",
    )
