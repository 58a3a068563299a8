"""What a sparse-training method is made of: Method = Reparam + UpdateRule + Schedule, all frozen values."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from fxsparse.pattern import Pattern
from fxsparse.schedule import Schedule


class Probe(Enum):
    """The gradient information an update needs beyond the active entries."""

    NONE = "none"
    SAMPLED = "sampled"
    DENSE = "dense"


class Reparam(Protocol):
    """How the stored weight becomes the effective weight, and how its gradient flows back."""

    exact_zeros: bool
    """Pruned entries are kept at exactly 0 in storage; only then may storage be compact."""

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool) -> Tensor:
        """The weight the op sees, differentiable; with `dense_grad` the gradient is left unmasked (a probe step)."""
        ...

    def fold(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The effective weight as a plain tensor, for inference and ``to_dense``."""
        ...


@dataclass(frozen=True)
class WeightView:
    """One weight as an update rule sees it, the same for masked and compact storage."""

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    nnz: int
    """Entries the weight has to have after this update."""
    step: int
    drop_fraction: float
    active: Tensor
    """Flat positions of the stored entries, int64 [nnz], ascending."""
    values: Tensor
    """Their weights, [nnz]."""
    weight: Callable[[], Tensor]
    """The dense weight, hidden values included; masked storage only."""
    gradient_tiles: Callable[[], Iterator[tuple[int, Tensor]]]
    """Row tiles of the signed dense gradient: (first row, [rows, fan_in]); only with Probe.DENSE."""
    generator: torch.Generator
    """Seeded by (seed, weight name, step), so that all ranks draw the same numbers."""


class UpdateRule(Protocol):
    """Chooses the entries that are active after an update."""

    probe: Probe

    def __call__(self, view: WeightView) -> Tensor:
        """Flat positions of the entries to be active, int64, ascending."""
        ...


class Score(Protocol):
    """The initial mask's score: larger is kept first."""

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """A sparse-training method as a value."""

    name: str
    reparam: Reparam
    init: Score
    source: str
    rule: UpdateRule | None = None
    schedule: Schedule | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The keyword arguments it was built from: what ``Plan.to_dict`` writes."""
