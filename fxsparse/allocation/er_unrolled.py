"""GSE's Erdos-Renyi: plain ER on the unrolled matrix [outputs, inputs * kernel], densities clipped at 1."""

from collections.abc import Sequence
from math import ceil, fsum

from fxsparse.allocation.counts import to_counts
from fxsparse.allocation.target import Target, Weight


def er_unrolled_densities(specs: Sequence[Weight], target: Target) -> dict[str, float]:
    """{name: density}, ``min(1, scale * (n_in + n_out) / (n_in * n_out))`` (arXiv:2401.06898, section 3)."""
    if _keeps_all(specs, target):
        return {s.name: 1.0 for s in target.free(specs)}
    scale = _scale(specs, target)
    return {s.name: min(1.0, scale * _sides(s) / s.numel) for s in target.free(specs)}


def er_unrolled(specs: Sequence[Weight], target: Target) -> dict[str, int]:
    """{name: nnz}; what clipping cuts off is not given to other weights, as in the paper.

    The counts then sum to the target less the clipped entries, rounded down; without clipping to the target.  A target
    of every entry clips none.
    """
    if _keeps_all(specs, target):
        return {s.name: s.numel for s in target.free(specs)} | target.forced_counts(specs)
    scale = _scale(specs, target)
    clipped = fsum(max(0.0, scale * _sides(s) - s.numel) for s in target.free(specs))
    total = target.free_total(specs) - ceil(clipped)
    return to_counts(specs, er_unrolled_densities(specs, target), total) | target.forced_counts(specs)


def _keeps_all(specs: Sequence[Weight], target: Target) -> bool:
    return target.free_total(specs) == sum(s.numel for s in target.free(specs))


def _scale(specs: Sequence[Weight], target: Target) -> float:
    free = target.free(specs)
    return target.free_total(specs) / sum(map(_sides, free)) if free else 0.0


def _sides(spec: Weight) -> int:
    outputs = spec.shape[1 if spec.op.startswith("conv_transpose") else 0]
    return outputs + spec.numel // outputs
