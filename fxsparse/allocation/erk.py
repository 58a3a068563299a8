"""Erdos-Renyi-Kernel: density proportional to the sum of all dimensions over their product."""

from collections.abc import Callable, Sequence
from math import floor, prod

from fxsparse.allocation.counts import to_counts
from fxsparse.allocation.proportional import proportional
from fxsparse.allocation.target import Target, Weight


def erk_densities(
    specs: Sequence[Weight], target: Target, zeros: Callable[[float], int] = floor
) -> dict[str, float]:
    """{name: density}, ``min(1, scale * sum(shape) / prod(shape))`` (arXiv:1911.11134, section 3).

    `zeros` is as in `proportional`.
    """
    return proportional(specs, target, _raw, zeros)[0]


def erk(specs: Sequence[Weight], target: Target) -> dict[str, int]:
    """{name: nnz} by ERK; what would exceed density 1 becomes dense and the others share what is left."""
    counts = to_counts(specs, erk_densities(specs, target), target.free_total(specs))
    return counts | target.forced_counts(specs)


def _raw(spec: Weight) -> float:
    return sum(spec.shape) / prod(spec.shape)
