"""The constraint on a mask, apart from how it is stored."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Pattern(Protocol):
    """Which masks are allowed.  A frozen dataclass; its fields are its options."""

    row_local: bool
    """Rows choose on their own, so that a score may be projected row tile by row tile."""

    def feasible(self, shape: Sequence[int], nnz: int) -> int:
        """The allowed count nearest to and not above `nnz`; PatternError where the shape does not fit."""
        ...

    def project(self, score: Tensor, nnz: int) -> Tensor:
        """Bool mask of the score's shape with exactly ``feasible(shape, nnz)`` ones at the largest scores."""
        ...

    def prune(self, score: Tensor, keep: int) -> Tensor:
        """Bool mask of at most `keep` ones at the largest scores, by the pattern's unit (entry or block), quotas ignored.

        Entries with score -inf are never kept.
        """
        ...

    def check(self, mask: Tensor) -> None:
        """Raise PatternError naming the first row or group that breaks the pattern."""
        ...
