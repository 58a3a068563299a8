"""Spartan: differentiable sparsity by regularised transport, and the two methods that it is compared with."""

from fxsparse.errors import PlanError
from fxsparse.knapsack import KeepLargest, Sharpness
from fxsparse.method import Method, register
from fxsparse.options import check_steps, is_number
from fxsparse.reparam import HiddenMask
from fxsparse.schedule import LinearRamp, Schedule
from fxsparse.scores import score_named
from fxsparse.soft_masks import AveragedMask, SoftMask


@register
def spartan(
    steps: int = 125_100,
    beta: float = 10.0,
    scope: str = "global",
    warmup: float = 0.2,
    finetune: float = 0.2,
) -> Method:
    """Weights times a soft top-k of their magnitudes, cut to a hard one: Tai et al. 2022, arXiv:2205.14107.

    Of `steps` optimizer steps (by default 100 epochs of ImageNet at batch 1,024) the budget falls linearly from
    everything to the plan's over the first `warmup`, and the sharpness rises linearly from 1 to `beta` until the last
    `finetune`: there the masks, which are not binary, stay as they are and only kept weights learn.  Inference and
    ``to_dense`` fold ``weight * mask``.  All weights learn before that, so storage is masked and every backward dense.

    Args:
        beta: 10 for the paper's ResNet-50, 20 for its ViT-B/16 and as its code's default; blocks of n entries take
            ``beta * sqrt(n)``, and so do all weights that share a budget with them.
        scope: "global" ranks all weights together, as the paper; "layer" keeps the count that the plan's allocation
            gives each ("uniform", "erk").
    """
    freeze = _freeze(steps, warmup, finetune)
    if not is_number(beta) or beta < 1:
        raise PlanError(f"expected beta as a number >= 1, got {beta!r}. The paper has 10 and 20.")
    rule = KeepLargest(_together(scope), Sharpness(float(beta), freeze))
    return Method(
        name="spartan",
        reparam=SoftMask(),
        init=score_named("magnitude"),
        rule=rule,
        schedule=Schedule(every=1, start=1, stop=freeze + 1, ramp=LinearRamp(round(steps * warmup))),
        source="arXiv:2205.14107",
    )


@register
def dual_averaging(
    steps: int = 125_100, scope: str = "global", warmup: float = 0.2, finetune: float = 0.2
) -> Method:
    """The hard mask of `spartan`'s schedule in forward, the whole gradient in backward: arXiv:2205.14107, algorithm 2.

    That is Top-KAST (arXiv:2106.03517) without its sparse backward.  For the last `finetune` the mask stays, and the
    gradient of what is kept alone goes on.
    """
    return _hard("dual_averaging", AveragedMask(), steps, scope, warmup, finetune)


@register
def imp(steps: int = 125_100, scope: str = "global", warmup: float = 0.2, finetune: float = 0.2) -> Method:
    """Iterative magnitude pruning on `spartan`'s schedule: a hard mask in forward and backward, arXiv:2205.14107,
    algorithm 1 (the "standard" of its code).
    """
    return _hard("imp", HiddenMask(), steps, scope, warmup, finetune)


def _hard(
    name: str, reparam: HiddenMask | AveragedMask, steps: int, scope: str, warmup: float, finetune: float
) -> Method:
    freeze = _freeze(steps, warmup, finetune)
    return Method(
        name=name,
        reparam=reparam,
        init=score_named("magnitude"),
        rule=KeepLargest(_together(scope)),
        schedule=Schedule(every=1, start=1, stop=freeze + 1, ramp=LinearRamp(round(steps * warmup))),
        source="arXiv:2205.14107",
    )


def _freeze(steps: int, warmup: float, finetune: float) -> int:
    check_steps("steps", steps, 5)
    for name, share in (("warmup", warmup), ("finetune", finetune)):
        if not is_number(share) or not 0 < share < 1:
            raise PlanError(f"expected {name} as a share of the steps between 0 and 1, got {share!r}.")
    freeze = steps - round(steps * finetune)
    if freeze < 1:
        raise PlanError(
            f"expected a step before the finetune, got a share of {finetune}, which is all {steps} steps. Lower it."
        )
    if not round(steps * warmup):
        raise PlanError(
            f"expected a warmup of at least one of the {steps} steps, got a share of {warmup}, which is 0 of them. "
            f"Use {1 / steps:.3g} or more."
        )
    if round(steps * warmup) > freeze:
        raise PlanError(f"expected warmup + finetune of at most 1, got {warmup} + {finetune}.")
    return freeze


def _together(scope: str) -> bool:
    if scope not in ("global", "layer"):
        raise PlanError(f"expected scope as global or layer, got {scope!r}.")
    return scope == "global"
