"""The set of a weight's entries that were active at any time."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class EverActive:
    """A growing set of flat positions, as sorted positions or as one bit per entry: whichever is smaller.

    So a weight costs at most ``numel / 8`` bytes, and one of which little was visited far less.
    """

    numel: int
    held: Tensor
    """Positions, int32 [count] (int64 from 2**31 entries on), ascending; or uint8 [numel / 8], lowest bit first."""
    count: int = 0

    @staticmethod
    def of(positions: Tensor, numel: int) -> "EverActive":
        """The set of these flat positions, int64 without repeats."""
        dtype = torch.int32 if numel <= 2**31 else torch.int64
        found = EverActive(numel, positions.new_empty(0, dtype=dtype))
        found.add(positions)
        return found

    def add(self, positions: Tensor) -> None:
        """Take in flat positions, int64 without repeats; in place, and on their device from now on."""
        self.held = self.held.to(positions.device)
        if self.held.dtype == torch.uint8:
            self._set_bits(positions)
            return
        self.held = torch.cat([self.held, positions.to(self.held.dtype)]).unique()
        self.count = len(self.held)
        if self.held.nbytes > _bytes(self.numel):
            visited, self.count = self.held.long(), 0
            self.held = visited.new_zeros(_bytes(self.numel), dtype=torch.uint8)
            self._set_bits(visited)

    def _set_bits(self, positions: Tensor) -> None:
        byte, bit = positions >> 3, positions & 7
        unset = (self.held[byte] >> bit.to(torch.uint8)) & 1 == 0
        # Bits that are 0 may be added like numbers, several to one byte.
        self.held.index_add_(0, byte[unset], (1 << bit[unset]).to(torch.uint8))
        self.count += int(unset.sum())


def _bytes(numel: int) -> int:
    return (numel + 7) // 8
