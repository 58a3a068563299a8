"""How the products with blocks are launched: what can be chosen, the default first, without a device or Triton."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, isqrt

_LARGE = 1 << 15
_TILES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Launch:
    """Of one kernel: the tile of tokens that a program takes at a time, its warps, and how far it loads ahead."""

    tokens: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What Triton calls them."""
        return {"num_warps": self.warps, "num_stages": self.stages}


def of_product(tokens: int, entries: int, itemsize: int, tensor_cores: bool = True) -> Sequence[Launch]:
    """For outputs or input gradients with blocks of so many entries: as many tokens in a tile as there are, up to 128.

    Fewer beside large blocks, and fewer still without `tensor_cores`, in fp32 where PyTorch is to round nothing.  The
    largest tiles of fp32 go by 4 warps: with 8 they spill on sm_100.
    """
    size = entries * itemsize
    most = min(64 if size >= _LARGE else 128, max(16, 1 << max(0, tokens - 1).bit_length()))
    most = most if tensor_cores else min(most, 2048 // isqrt(entries))
    tiles = [most, *(tile for tile in reversed(_TILES) if most // 4 <= tile < most)]
    stages = 2 if size > _LARGE else 3
    most_by_8 = 1 << (20 if itemsize == 4 else 21)
    by_tile = [Launch(tile, 8 if 1 << 19 <= tile * size <= most_by_8 else 4, stages) for tile in tiles]
    first = by_tile[0]
    return [*by_tile, replace(first, warps=12 - first.warps), replace(first, stages=5 - stages)]


def of_sample(height: int, width: int, itemsize: int) -> Sequence[Launch]:
    """For weight gradients: of one block's inputs and gradients, 128 bytes of tokens at a time."""
    first = Launch(128 // itemsize, min(8, max(1, height * width // 1024)), 3)
    return [first, replace(first, stages=2), replace(first, tokens=first.tokens // 2, stages=4)]


BAND = 8
"""Tiles of tokens that go through all rows together.

In a band the rows go from the longest to the shortest, so that what is left at the end are the shortest, and a band's
inputs and the weight stay in the L2 cache.  To cut long rows would need sums of a second stage, which read and write
every output again.
"""


def splits_of_sample(blocks: int, tokens: int, tile: int, multiprocessors: int) -> int:
    """Parts of the tokens that are summed apart, so that a few blocks fill a GPU four times; of 4 tiles or more."""
    wanted = ceil(4 * multiprocessors / max(1, blocks))
    return max(1, min(wanted, tokens // (4 * tile)))
