"""Densities proportional to a raw value per weight, capped at 1: the fixed point that ER and ERK share."""

from collections.abc import Callable, Sequence
from math import floor, fsum

from fxsparse.allocation.target import Target, Weight


def proportional(
    specs: Sequence[Weight],
    target: Target,
    raw: Callable[[Weight], float],
    zeros: Callable[[float], int] = floor,
) -> tuple[dict[str, float], float, frozenset[str]]:
    """({name: density} of the free weights, scale, names that became dense).

    Density = ``min(1, scale * raw)``.  A weight that would exceed 1 is made dense, counts in the budget, and
    `scale` is solved again, until none does (arXiv:1911.11134).  `zeros` rounds the zeros of a weight when
    the budget is added up: down as in SRigL's tables, or up (`math.ceil`) as in RigL's MobileNet tables; the
    last digits of published densities depend on it.
    """
    free = target.free(specs)
    if not free:
        return {}, 0.0, frozenset()
    sparsity = target.free_sparsity(specs)
    budget = sum(s.numel - zeros(sparsity * s.numel) for s in free)
    raws = {s.name: raw(s) for s in free}
    dense: frozenset[str] = frozenset()
    while True:
        open_weights = [s for s in free if s.name not in dense]
        if not open_weights:
            return dict.fromkeys(raws, 1.0), 0.0, dense
        left = budget - sum(s.numel for s in free if s.name in dense)
        scale = left / fsum(raws[s.name] * s.numel for s in open_weights)
        largest = max(raws[s.name] for s in open_weights)
        if largest * scale <= 1:
            break
        dense |= {s.name for s in open_weights if raws[s.name] == largest}
    return {name: 1.0 if name in dense else scale * raws[name] for name in raws}, scale, dense
