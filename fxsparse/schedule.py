"""When a topology moves, and by how much: frozen values of the optimizer step."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fxsparse.errors import PlanError
from fxsparse.options import check_integer, check_one_of, is_number


def _check_fraction(name: str, value: float) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise PlanError(f"expected {name} as a number from 0 to 1, got {value!r}.")


class Curve(Protocol):
    """A number as a function of the optimizer step; serialisable by its fields."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __post_init__(self) -> None:
        _check_fraction("drop fraction", self.value)

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Cosine:
    """``initial / 2 * (1 + cos(pi * step / stop))``, 0 from `stop` on: RigL, arXiv:1911.11134 section 3."""

    initial: float
    stop: int

    def __post_init__(self) -> None:
        _check_fraction("drop fraction", self.initial)
        check_integer("stop", self.stop, 1)

    def __call__(self, step: int) -> float:
        return self.initial / 2 * (1 + math.cos(math.pi * min(step, self.stop) / self.stop))


@dataclass(frozen=True)
class CosineTo:
    """A cosine from `initial` at step 0 to `final` at `stop` and after it: GraNet, arXiv:2106.10404."""

    initial: float
    final: float
    stop: int

    def __post_init__(self) -> None:
        _check_fraction("drop fraction", self.initial)
        _check_fraction("final drop fraction", self.final)
        check_integer("stop", self.stop, 1)

    def __call__(self, step: int) -> float:
        done = min(step, self.stop) / self.stop
        return self.final + (self.initial - self.final) / 2 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Rising:
    """From 0 at step `start` along a cubic to `final` at `stop`, and that after it."""

    final: float
    start: int
    stop: int

    def __call__(self, step: int) -> float:
        done = min(max(step - self.start, 0) / (self.stop - self.start), 1.0)
        return self.final * (1 - (1 - done) ** 3)


@dataclass(frozen=True)
class InversePower:
    """``initial * (1 - step / stop) ** power``, 0 from `stop` on: arXiv:1911.11134 appendix G (1 and 3)."""

    initial: float
    stop: int
    power: int

    def __post_init__(self) -> None:
        _check_fraction("drop fraction", self.initial)
        check_integer("stop", self.stop, 1)
        check_integer("power", self.power, 1)

    def __call__(self, step: int) -> float:
        return self.initial * (1 - min(step, self.stop) / self.stop) ** self.power


def decay_curve(name: str, initial: float, stop: int | None) -> Curve:
    """The drop fraction by name: "constant", or "cosine", "linear" or "cubic", which end at `stop`."""
    if name == "constant":
        return Constant(initial)
    check_one_of("decay", name, ("constant", "cosine", "linear", "cubic"))
    if stop is None:
        raise PlanError(f"expected stop as an integer for decay={name!r}, got None. Use decay='constant'?")
    if name == "cosine":
        return Cosine(initial, stop)
    return InversePower(initial, stop, power=1 if name == "linear" else 3)


class Ramp(Protocol):
    """The number of nonzeros as a function of the optimizer step."""

    def __call__(self, step: int, final: int, numel: int) -> int: ...


@dataclass(frozen=True)
class CubicRamp:
    """From `initial_sparsity` at `start` to the final nnz at `stop`: Zhu and Gupta, arXiv:1710.01878 eq. 1.

    The nonzeros, not the sparsity, are interpolated and rounded once, so that both ends are exact.
    """

    initial_sparsity: float
    start: int
    stop: int

    def __post_init__(self) -> None:
        _check_fraction("initial_sparsity", self.initial_sparsity)
        check_integer("start", self.start, 0)
        check_integer("stop", self.stop, self.start + 1)

    def __call__(self, step: int, final: int, numel: int) -> int:
        done = min(max(step - self.start, 0) / (self.stop - self.start), 1.0)
        initial = max(final, round((1 - self.initial_sparsity) * numel))
        return final + round((initial - final) * (1 - done) ** 3)


@dataclass(frozen=True)
class LinearRamp:
    """From everything at step 0 to the final nnz at `stop`: Spartan, arXiv:2205.14107 section 3.4."""

    stop: int

    def __post_init__(self) -> None:
        check_integer("stop", self.stop, 1)

    def __call__(self, step: int, final: int, numel: int) -> int:
        return final + round((numel - final) * (1 - min(max(step, 0) / self.stop, 1.0)))


@dataclass(frozen=True)
class Levels:
    """A table of ``(from step, sparsity)``, ascending; None as the sparsity stands for the final nnz.

    Before the first entry and at sparsity 0 everything is there.  AC/DC's phases (arXiv:2106.12379) and MEST's bounds
    (arXiv:2110.14032) are such tables.
    """

    table: tuple[tuple[int, float | None], ...]

    def __post_init__(self) -> None:
        for step, sparsity in self.table:
            check_integer("a step of the table", step, 0)
            if sparsity is not None:
                _check_fraction("a sparsity of the table", sparsity)
        steps = [step for step, _ in self.table]
        if not steps or steps != sorted(set(steps)):
            raise PlanError(f"expected a table of ascending steps, got {steps}.")

    def __call__(self, step: int, final: int, numel: int) -> int:
        sparsity: float | None = 0.0
        for first, level in self.table:
            if first <= step:
                sparsity = level
        return final if sparsity is None else round((1 - sparsity) * numel)


@dataclass(frozen=True)
class Schedule:
    """Update at step t if ``start <= t < stop`` and ``(t - start) % every == 0``; or at the steps `at`, below `stop`.

    t counts the optimizer steps before the update, replaced ones included.  With `skip_step` it replaces
    the optimizer step (RigL, Algorithm 1), so it can come at t = 0; without, it follows one: t = 100 is the
    update after the 100th step, and the gradient it ranks is the one which that step was taken with.

    `drop_fraction`: share of the active entries that an update prunes.
    `ramp`: nonzeros at an update; None keeps them constant.
    """

    every: int
    stop: int | None = None
    start: int = 0
    skip_step: bool = False
    drop_fraction: Curve = Constant(0.0)
    ramp: Ramp | None = None
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_integer("every", self.every, 1)
        check_integer("start", self.start, 0)
        if self.stop is not None:
            check_integer("stop", self.stop, self.start)
        if self.at is not None:
            for step in self.at:
                check_integer("a step of an update", step, 0)
            if list(self.at) != sorted(set(self.at)):
                raise PlanError(f"expected ascending steps of updates, got {list(self.at)[:10]}.")

    def fires(self, step: int) -> bool:
        """Whether the masks move at this optimizer step."""
        if self.at is not None:
            place = bisect_left(self.at, step)
            listed = place < len(self.at) and self.at[place] == step
            return listed and (self.stop is None or step < self.stop)
        if step < self.start or (self.stop is not None and step >= self.stop):
            return False
        return (step - self.start) % self.every == 0

    def updates(self, total: int) -> Sequence[int]:
        """The steps t < `total` at which the masks move."""
        if self.at is not None:
            return self.at[: bisect_left(self.at, total if self.stop is None else min(total, self.stop))]
        return range(self.start, total if self.stop is None else min(total, self.stop), self.every)

    def last_update(self, step: int) -> int:
        """The latest step <= `step` at which the masks moved; -1 before the first."""
        moved = self.updates(step + 1)
        return moved[-1] if moved else -1
