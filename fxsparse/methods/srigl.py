"""SRigL: RigL with a constant fan-in and neuron ablation."""

from collections.abc import Sequence
from dataclasses import replace

from fxsparse.ablation import AblateAndGrow
from fxsparse.errors import PlanError
from fxsparse.method import Method, register
from fxsparse.options import check_flag, check_one_of, is_number
from fxsparse.pattern import ConstantFanIn
from fxsparse.reparam import HardMask
from fxsparse.schedule import Schedule, decay_curve
from fxsparse.scores import score_named
from fxsparse.weight_init import weight_init_named

PRESETS: dict[str, tuple[AblateAndGrow, str]] = {
    "srigl_paper": (AblateAndGrow(), "grad_flow"),
    "srigl_repo": (AblateAndGrow(authors_code=True), "grad_flow_srigl"),
}
"""{name: (rule, initial weights)}."""


@register
def srigl(
    every: int = 100,
    stop: int = 25_000,
    drop_fraction: float = 0.3,
    gamma_sal: float = 0.3,
    ablate: bool = True,
    never_ablate: Sequence[str] | None = None,
    decay: str = "cosine",
    preset: str = "srigl_paper",
    weight_init: str | None = None,
    init: str = "random",
) -> Method:
    """Constant fan-in, learned fan-out: Lasby et al. 2023, arXiv:2305.02299.

    Updates follow the optimizer's step, from step `every` on and below `stop` (three quarters of training).
    Grown weights start at 0.  The pattern is ``ConstantFanIn()``; the fan-in grows where neurons go.

    Args:
        gamma_sal: a neuron with fewer salient weights than this share of the initial fan-in is ablated; from 1 on,
            than this number.  The paper's 0.3 is for CNNs; its ViT-B/16 has 0.95.
        ablate: False keeps every neuron, and the fan-in.
        never_ablate: globs of weights that keep all neurons.  Outputs of the model and weights with a given
            ``ConstantFanIn(fan_in)`` do so anyway.
        preset: "srigl_paper", or "srigl_repo": the authors' code, what it gets wrong included, for comparison.
        weight_init: the selected weights are drawn anew by "grad_flow" (N(0, 2/fan-in), the default) or
            "grad_flow_srigl" (the repo's standard deviation 2/fan-in); "keep" leaves them as they come.

    The optimizer's state starts at 0 with every grown weight, whatever the optimizer: the authors' code sees to it
    for SGD alone.
    """
    check_one_of("preset", preset, PRESETS)
    check_flag("ablate", ablate)
    globs = _globs(never_ablate)
    rule, default_init = PRESETS[preset]
    return Method(
        name="srigl",
        reparam=HardMask(),
        init=score_named(init),
        rule=replace(rule, gamma_sal=_checked(gamma_sal)),
        schedule=Schedule(every, stop, start=every, drop_fraction=decay_curve(decay, drop_fraction, stop)),
        source="arXiv:2305.02299",
        pattern=ConstantFanIn(),
        weight_init=weight_init_named(default_init if weight_init is None else weight_init),
        varying_nnz=ablate,
        never_ablate=globs if ablate else None,
    )


def _checked(gamma_sal: float) -> float:
    if not is_number(gamma_sal) or gamma_sal <= 0 or (gamma_sal > 1 and gamma_sal != int(gamma_sal)):
        raise PlanError(
            f"expected gamma_sal as a share of the fan-in above 0, or a whole number from 1 on, got {gamma_sal!r}. "
            "ablate=False keeps every neuron."
        )
    return gamma_sal


def _globs(never_ablate: Sequence[str] | None) -> tuple[str, ...]:
    globs = () if never_ablate is None else never_ablate
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise PlanError(f"expected never_ablate as a list of globs such as ['head'], got {never_ablate!r}.")
    return tuple(globs)
