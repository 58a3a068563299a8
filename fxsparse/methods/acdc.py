"""AC/DC: alternating compressed and decompressed training."""

from collections.abc import Sequence

from fxsparse.errors import PlanError
from fxsparse.method import Method, register
from fxsparse.options import check_steps
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask
from fxsparse.rules import LargestOfAll
from fxsparse.schedule import Levels, Schedule
from fxsparse.scores import score_named

STEPS = 500_400
"""100 epochs of ImageNet at batch 256 (5,004 steps each)."""


@register
def acdc(
    steps: int = STEPS,
    compress: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85),
    decompress: Sequence[float] = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75),
) -> Method:
    """Dense and sparse phases in turn, the last one sparse: Peste et al. 2021, arXiv:2106.12379, Algorithm 1.

    At a compression the largest magnitudes of all weights together stay, exactly as many as the plan says, and the
    masks rest until the phase ends.  At a decompression everything may learn again: what was pruned starts at exactly
    0, and the optimizer's state of all these weights is dropped ("reset momentum", on in the authors' ImageNet
    scripts).  `compress` and `decompress` are shares of the `steps`; the defaults are the paper's 100 epochs of
    ResNet-50 (compress at 10, 20, ..., 70 and 85, decompress at 15, 25, ..., 75), half of them dense.
    The statistics of BatchNorm belong to the phase that they were taken in.
    """
    check_steps("steps", steps, 2)
    table = {**_phases(compress, None, steps, "compress"), **_phases(decompress, 0.0, steps, "decompress")}
    moments = tuple(sorted(table))
    kinds = [table[moment] for moment in moments]
    if (
        not table
        or len(table) < len(tuple(compress)) + len(tuple(decompress))
        or kinds != _alternating(len(kinds))
    ):
        raise PlanError(
            f"expected phases that alternate, a compression first and last, got compress={list(compress)} and "
            f"decompress={list(decompress)} of {steps} steps. Every phase needs a step."
        )
    return Method(
        name="acdc",
        reparam=HardMask(),
        init=score_named("magnitude"),
        rule=LargestOfAll(forget=True),
        schedule=Schedule(1, steps, ramp=Levels(tuple((m, table[m]) for m in moments)), at=moments),
        source="arXiv:2106.12379",
        pattern=Unstructured(),
    )


def _phases(shares: Sequence[float], level: float | None, steps: int, name: str) -> dict[int, float | None]:
    if not isinstance(shares, tuple | list) or not all(
        isinstance(s, int | float) and 0 < s < 1 for s in shares
    ):
        raise PlanError(f"expected {name} as shares of the steps between 0 and 1, got {shares!r}.")
    return {max(1, round(share * steps)): level for share in shares}


def _alternating(count: int) -> list[float | None]:
    return [0.0 if place % 2 else None for place in range(count)] if count % 2 else []
