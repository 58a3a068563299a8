"""Sparsities or counts written out by the user."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fxsparse.allocation.target import Target, Weight
from fxsparse.allocation.uniform import uniform
from fxsparse.errors import PlanError
from fxsparse.globs import matches, unmatched


@dataclass(frozen=True)
class Explicit:
    """``{glob: sparsity}`` (a float) or ``{glob: nnz}`` (an int); the first glob that names a weight decides.

    Weights that no glob names share the plan's sparsity uniformly.

    Raises:
        PlanError: a value that is neither, or, when called, a glob that names no weight.
    """

    table: Mapping[str, float | int]

    def __post_init__(self) -> None:
        for glob, wish in self.table.items():
            _check_wish(glob, wish)

    def __call__(self, specs: Sequence[Weight], target: Target) -> dict[str, int]:
        """{name: nnz}; what `target` forces goes before the table."""
        return uniform(specs, self.force(specs, target))

    def force(self, specs: Sequence[Weight], target: Target) -> Target:
        """The target with the table's wishes among the forced; PlanError for a glob that names no weight."""
        lost = unmatched(self.table, [s.name for s in specs])
        if lost:
            names = ", ".join(s.name for s in specs[:3])
            raise PlanError(
                f"allocation: expected globs of selected weights, {lost[0]!r} names none of {names}, ..."
            )
        first_wins = list(self.table.items())[::-1]
        wishes = {s.name: wish for s in specs for glob, wish in first_wins if matches(glob, s.name)}
        return replace(target, forced=wishes | dict(target.forced))


def _check_wish(glob: str, wish: float) -> None:
    if not isinstance(glob, str) or isinstance(wish, bool) or not isinstance(wish, float | int):
        raise PlanError(f"allocation: expected {{glob: sparsity or nnz}}, got {glob!r}: {wish!r}.")
    if isinstance(wish, float) and not 0 <= wish < 1:
        raise PlanError(f"allocation[{glob!r}]: expected a sparsity in [0, 1), got {wish}.")
    if isinstance(wish, int) and wish < 1:
        raise PlanError(
            f"allocation[{glob!r}]: expected at least 1 nonzero, got {wish}; write 0.0 for a dense weight."
        )
