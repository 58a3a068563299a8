"""Erdos-Renyi: density proportional to (inputs + outputs) / (inputs * outputs), channels only."""

from collections.abc import Sequence

from fxsparse.allocation.counts import to_counts
from fxsparse.allocation.proportional import proportional
from fxsparse.allocation.target import Target, Weight


def er_densities(specs: Sequence[Weight], target: Target) -> dict[str, float]:
    """{name: density} of the free weights; kernel sizes play no part (arXiv:1707.04780, 1911.11134)."""
    return proportional(specs, target, _raw)[0]


def er(specs: Sequence[Weight], target: Target) -> dict[str, int]:
    """{name: nnz} by ER; what would exceed density 1 becomes dense and the others share what is left."""
    counts = to_counts(specs, er_densities(specs, target), target.free_total(specs))
    return counts | target.forced_counts(specs)


def _raw(spec: Weight) -> float:
    rows, columns = spec.shape[:2]
    return (rows + columns) / (rows * columns)
