"""The same sparsity everywhere."""

from collections.abc import Sequence

from fxsparse.allocation.counts import to_counts
from fxsparse.allocation.target import Target, Weight


def uniform_densities(specs: Sequence[Weight], target: Target) -> dict[str, float]:
    """{name: density} of the free weights."""
    free = target.free(specs)
    return dict.fromkeys((s.name for s in free), 1 - target.free_sparsity(specs)) if free else {}


def uniform(specs: Sequence[Weight], target: Target) -> dict[str, int]:
    """{name: nnz}: one sparsity for all free weights; `keep_dense_counts` raises it to pay for dense ones."""
    counts = to_counts(specs, uniform_densities(specs, target), target.free_total(specs))
    return counts | target.forced_counts(specs)
