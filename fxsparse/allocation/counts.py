"""The one step from densities to integers."""

from collections.abc import Mapping, Sequence
from math import floor

from fxsparse.allocation.target import Weight


def to_counts(specs: Sequence[Weight], densities: Mapping[str, float], total: int) -> dict[str, int]:
    """{name: nnz} of the weights in `densities`, summing to `total` exactly, each within [1, numel].

    Every count starts as ``floor(numel * density)``, the published codes' rounding.  What is then missing
    from `total` goes one by one to the largest fractional parts; what is too much comes off the smallest
    ones, off whole numbers (dense weights) last; ties go by name.
    `total` has to lie between the number of weights and their numel, as `Target.free_total` checks.
    """
    weights = sorted((s for s in specs if s.name in densities), key=lambda s: s.name)
    most = {s.name: s.numel for s in weights}
    exact = {s.name: s.numel * densities[s.name] for s in weights}
    counts = {name: min(max(floor(exact[name]), 1), most[name]) for name in exact}
    missing = total - sum(counts.values())
    if missing < 0:
        step, turns = -1, sorted(exact, key=lambda name: (exact[name] % 1 or 1.0, name))
    else:
        step, turns = 1, sorted(exact, key=lambda name: (-(exact[name] % 1), name))
    while missing:
        for name in turns:
            if missing and 1 <= counts[name] + step <= most[name]:
                counts[name] += step
                missing -= step
    return counts
