"""How products with N:M weights are launched: what can be chosen, the default first, without a device or Triton."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

DECODED = 8
"""Tokens up to which inputs are gathered for every value; more go through tensor cores."""


@dataclass(frozen=True)
class Launch:
    """Of one kernel: rows of the weight, tokens, and inputs (or stored values) at a time; warps and stages."""

    rows: int
    tokens: int
    inputs: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What Triton calls them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def of_tiles(tokens: int, n: int, m: int, itemsize: int, strided: bool = False) -> Sequence[Launch]:
    """For tensor cores: 128 bytes of inputs at a time; fewer rows for a few tokens or many values.

    Those of strided groups are in M places, at least 4 in each.
    """
    most = min(128, max(16, 1 << max(0, tokens - 1).bit_length()))
    inputs = max(128 // itemsize, 4 * m if strided else m)
    first = Launch(128 if n <= 2 and most >= 64 else 64, most, inputs, 8 if most >= 64 else 4, 3)
    others = [
        replace(first, rows=first.rows // 2),
        replace(first, warps=12 - first.warps),
        replace(first, stages=2),
    ]
    return [first, *others, *([replace(first, tokens=most // 2)] if most > 16 else [])]


def of_gather(tokens: int, rows: int, multiprocessors: int) -> Sequence[Launch]:
    """For up to DECODED tokens: values of 8 rows, or of fewer where rows would not fill a GPU four times."""
    padded = 1 << max(0, tokens - 1).bit_length()
    most = 8 // max(1, padded // 2)
    height = next((h for h in (8, 4, 2) if h <= most and rows >= 4 * h * multiprocessors), 1)
    first = Launch(height, padded, 512 if padded == 1 else 256, 4, 3)
    other = replace(first, inputs=768 - first.inputs)
    return [first, other, replace(first, rows=max(1, height // 2)), replace(first, warps=2)]
