"""Whole numbers of entries for weights that share a total, each within its capacity."""

from collections.abc import Sequence
from math import floor, fsum

from fxsparse.errors import InvariantError


def shares(total: int, wanted: Sequence[float], capacities: Sequence[int]) -> list[int]:
    """`total` in proportion to `wanted`, at most `capacities` each, summing to `total` exactly.

    What goes above a capacity spills over to the others in the same proportion; where all that are wanted are full,
    or none is wanted, evenly to those that have room.  Fractions are rounded down, and what is then missing goes one
    by one to the largest of them; ties go to the first.

    Raises:
        InvariantError: there is not so much room.
    """
    if total > sum(capacities):
        raise InvariantError(
            f"expected room for {total} entries, got {sum(capacities)} in {len(capacities)} weights."
        )
    given = [0] * len(capacities)
    while missing := total - sum(given):
        room = [capacity - count for capacity, count in zip(capacities, given, strict=True)]
        weights = [max(0.0, want) if free else 0.0 for want, free in zip(wanted, room, strict=True)]
        if not fsum(weights):
            weights = [float(free > 0) for free in room]
        for index, more in enumerate(_rounded(missing, weights)):
            given[index] += min(more, room[index])
    return given


def _rounded(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in proportion to `weights`, by largest remainders; nothing where the weight is 0."""
    whole = fsum(weights)
    exact = [total * (weight / whole) for weight in weights]
    counts = [floor(number) for number in exact]
    turns = [index for index in range(len(weights)) if weights[index]]
    turns.sort(key=lambda index: (counts[index] - exact[index], index))
    for place in range(total - sum(counts)):
        counts[turns[place % len(turns)]] += 1
    return counts
