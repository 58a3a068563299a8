"""GSE: guided stochastic exploration, always-sparse training by sampled growth."""

from fxsparse.method import Method, register
from fxsparse.options import check_one_of, check_positive
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask
from fxsparse.sampling import SAMPLINGS, SampleAndGrow, SampleAndGrowJointly
from fxsparse.schedule import Schedule, decay_curve
from fxsparse.scores import score_named
from fxsparse.weight_init import weight_init_named


@register
def gse(
    every: int = 1_000,
    stop: int = 46_800,
    drop_fraction: float = 0.2,
    gamma: float = 1.0,
    sampling: str = "uniform",
    scope: str = "layer",
    decay: str = "cosine",
    variant: str = "paper",
    weight_init: str = "unit_variance",
    init: str = "random",
) -> Method:
    """Draw a few inactive entries, grow the best by gradient, prune by magnitude: Heddes et al. 2024, arXiv:2401.06898.

    In compact storage no dense weight, mask or gradient is ever made.  Updates come at every `every`-th step from
    `every` on and below `stop` (120 epochs of CIFAR at batch 128).  An update has its batch to itself: that of
    ``sparse.exploring()``, or, with ``variant="paper"`` and nothing explored, that of its own step, which the optimizer
    then does not take; with ``variant="torch"`` it takes that step first.  Grown weights start at 0.

    Args:
        gamma: pairs drawn for each active entry; 1 on CIFAR, 2 on ImageNet.
        sampling: "uniform" (the paper's choice), "grabo" (by inputs' and output gradients' magnitude) or "graest" (by
            an unbiased estimate of the gradient).  A layer that saw only zeros is sampled uniformly.
        scope: "layer" keeps every layer's count.  "global", the default of the authors' code, ranks all weights
            together; counts then drift, so every weight is dense under a mask.
        weight_init: "unit_variance" draws the selected weights anew, U(-1, 1) * sqrt(3 / fan-in) as in the authors'
            code; "keep" leaves them as they come.

    A plan's default allocation is then the paper's, ``"er_unrolled"``.  However large gamma is, this is not RigL: RigL
    may grow again what the same update dropped, which here is no candidate, and drops ``floor(drop_fraction * |A|)``
    entries where this exchanges ``ceil`` of it.
    """
    check_one_of("variant", variant, ("paper", "torch"))
    check_one_of("sampling", sampling, SAMPLINGS)
    check_one_of("scope", scope, ("layer", "global"))
    check_positive("gamma", gamma, "The paper has 1 and 2.")
    each = SampleAndGrow(gamma, sampling)
    return Method(
        name="gse",
        reparam=HardMask(),
        init=score_named(init),
        rule=each if scope == "layer" else SampleAndGrowJointly(each),
        schedule=Schedule(
            every,
            stop,
            start=every,
            skip_step=variant == "paper",
            drop_fraction=decay_curve(decay, drop_fraction, stop),
        ),
        source="arXiv:2401.06898",
        pattern=Unstructured(),
        allocation="er_unrolled",
        weight_init=weight_init_named(weight_init),
    )
