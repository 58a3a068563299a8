"""Blocks of rows x columns in a weight [out, in, ...] at one kernel position: their numbers, sums and positions.

Blocks are counted by block row, then by block of input channels, then by kernel position.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fxsparse.selection import ascending


@dataclass(frozen=True)
class Grid:
    """How many blocks of `rows` outputs x `cols` input channels there are in a weight of `shape`, which they divide."""

    shape: Sequence[int]
    rows: int
    cols: int

    @property
    def size(self) -> tuple[int, int, int]:
        """Blocks of rows, of input channels, and kernel positions."""
        return self.shape[0] // self.rows, self.shape[1] // self.cols, prod(self.shape[2:])

    @property
    def entries(self) -> int:
        """Entries of a block."""
        return self.rows * self.cols

    def tiled(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [block rows, rows, blocks of channels, cols, kernel positions]."""
        down, across, kernel = self.size
        return tensor.reshape(down, self.rows, across, self.cols, kernel)

    def sums(self, tiles: Iterable[Tensor]) -> Tensor:
        """Sums of the scores [some rows, fan-in] that `tiles` have of all rows in turn, float64 [blocks].

        They are the same however rows are cut into tiles.  In float64 sums of finite float32 scores stay finite, below
        the +inf that forces a block in.
        """
        _, across, kernel = self.size
        sums, rest = [], None
        for tile in tiles:
            of_rows = tile.double().reshape(-1, across, self.cols, kernel).sum(2).flatten(1)
            of_rows = of_rows if rest is None else torch.cat([rest, of_rows])
            whole = len(of_rows) // self.rows * self.rows
            sums.append(of_rows[:whole].view(-1, self.rows, across * kernel).sum(1))
            rest = of_rows[whole:]
        return torch.cat(sums).flatten()

    def sums_at(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Sums of the `scores` at flat positions (ascending), float64 [blocks]; -inf where a block has holes."""
        numbers, order = self.numbers(positions).sort(stable=True)
        is_whole = torch.bincount(numbers, minlength=prod(self.size)) == self.entries
        sums = torch.full(is_whole.shape, -torch.inf, dtype=torch.float64, device=scores.device)
        sums[is_whole] = scores[order[is_whole[numbers]]].double().view(-1, self.entries).sum(1)
        return sums

    def numbers(self, positions: Tensor) -> Tensor:
        """The block that each flat position lies in, int64."""
        _, across, kernel = self.size
        row, channel = positions // (self.shape[1] * kernel), positions // kernel % self.shape[1]
        return (row // self.rows * across + channel // self.cols) * kernel + positions % kernel

    def positions(self, blocks: Tensor) -> Tensor:
        """Flat positions of all entries of these blocks, int64, ascending."""
        _, across, kernel = self.size
        row = blocks // (across * kernel) * self.rows
        channel = blocks // kernel % across * self.cols
        rows = row[:, None, None] + torch.arange(self.rows, device=blocks.device)[:, None]
        channels = channel[:, None, None] + torch.arange(self.cols, device=blocks.device)
        flat = (rows * self.shape[1] + channels) * kernel + (blocks % kernel)[:, None, None]
        return ascending(flat.flatten())
