"""How products with a sparse weight are cut into programs on a GPU: a few forms, and which of them fit a problem."""

from dataclasses import dataclass, replace
from itertools import product

import torch


@dataclass(frozen=True)
class Tiling:
    """What a program holds at a time: entries of some rows, each for a tile of tokens."""

    rows: int
    entries: int
    """Of each row."""
    tokens: int
    warps: int
    bands: int = 1
    """Programs that share the rows among them, for one tile of tokens."""
    splits: int = 1
    """Programs that share the entries of a row; their sums are added after."""

    @property
    def options(self) -> dict[str, int]:
        """Of the launch.  Left alone, the assembler of sm_100 spills rather than take more than 32 registers."""
        return {"num_warps": self.warps} | ({"maxnreg": 64} if self.tokens > 1 else {})


UNROLL = 4
"""Steps along the rows whose loads are under way at once."""

_WIDE = {4: 16, 2: 32}
"""Tokens of a tile by the bytes of a value: 64 bytes, so that what a tile of tokens has of 3,500 inputs fits an L1."""
_WARPS_OF_A_ROW = (1, 4, 16)
_MOST_SPLITS = 16


def tilings(
    tokens: int, rows: int, mean: float, dtype: torch.dtype, multiprocessors: int
) -> tuple[Tiling, ...]:
    """The forms to try for a weight with `mean` nonzeros in each of its `rows`; the first is to be taken unmeasured.

    Few tokens: a warp for each row, or where that leaves multiprocessors idle more of them, for what counts is to read
    the weight.  Many: one large program for each multiprocessor, which stays with its tile of tokens while that is in
    its L1.
    """
    width = min(_WIDE[dtype.itemsize], _power_of_2(tokens))
    tiles = max(1, -(-tokens // width))
    lanes = 32 // max(1, width * dtype.itemsize // 16)  # of a warp along a row, 16 bytes of tokens each
    forms = []
    for warps, team in product((8, 16), _WARPS_OF_A_ROW):
        height = max(1, warps // team)
        groups, entries = -(-rows // height), lanes * warps // height
        idle = 2 * multiprocessors // max(1, groups * tiles)  # programs that there would be room for
        splits = max(1, min(idle, _MOST_SPLITS, int(mean) // (UNROLL * entries)))
        bands = groups if tiles == 1 else min(groups, max(1, multiprocessors * 16 // warps // tiles))
        forms.append(Tiling(height, entries, width, warps, max(1, bands), 1 << (splits.bit_length() - 1)))
    mine = [form for form in forms if form.warps == (8 if tiles == 1 else 16)]
    busy = [form for form in mine if -(-rows // form.rows) * tiles >= 2 * multiprocessors]
    first = (busy or mine[-1:])[0]
    return first, *(form for form in dict.fromkeys(forms) if form != first)


def launched(dtype: torch.dtype) -> tuple[Tiling, ...]:
    """Every form that comes first for some problem, but for its bands and splits."""
    made = (
        tilings(tokens, rows, 300, dtype, 132)[0]
        for tokens, rows in product((1, 2, 4, 8, 16, 32, 256), (1, 1 << 9, 1 << 14))
    )
    return tuple(dict.fromkeys(replace(tiling, bands=1, splits=1) for tiling in made))


def _power_of_2(count: int) -> int:
    """The next one that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
