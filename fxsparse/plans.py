"""What is wanted: frozen values without tensors, serialisable."""

from collections.abc import Mapping
from dataclasses import dataclass

from fxsparse.method import Method
from fxsparse.pattern import Pattern


@dataclass(frozen=True)
class Override:
    """Other wishes for the weights that a glob matches; unset fields keep the plan's."""

    glob: str
    sparsity: float | None = None
    pattern: Pattern | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Filled in by the commit that follows."""

    sparsity: float
    allocation: str | Mapping[str, float] = "erk"
    pattern: Pattern
    method: Method
    storage: str = "auto"
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    keep_dense_counts: bool = False
    seed: int = 0
