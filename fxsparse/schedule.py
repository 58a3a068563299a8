"""When a topology moves, and by how much: frozen values of the optimizer step."""

import math
from dataclasses import dataclass
from typing import Protocol


class Curve(Protocol):
    """A number as a function of the optimizer step; serialisable by its fields."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Cosine:
    """``initial / 2 * (1 + cos(pi * step / stop))``: RigL's drop fraction, arXiv:1911.11134 section 3."""

    initial: float
    stop: int

    def __call__(self, step: int) -> float:
        return self.initial / 2 * (1 + math.cos(math.pi * step / self.stop))


@dataclass(frozen=True)
class Schedule:
    """Update at step t if ``start <= t < stop`` and ``(t - start) % every == 0``; t counts from 0.

    `skip_step`: the optimizer takes no step at an update (RigL, Algorithm 1); otherwise it steps first.
    `drop_fraction`: share of the active entries that an update prunes.
    `density`: share of the *final zeros already pruned* is ramped by GMP; None keeps nnz constant.
    """

    every: int
    stop: int | None = None
    start: int = 0
    skip_step: bool = False
    drop_fraction: Curve = Constant(0.0)

    def fires(self, step: int) -> bool:
        """Whether the masks move at this optimizer step."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return False
        return (step - self.start) % self.every == 0
