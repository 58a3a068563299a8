"""2:4 along rows and along columns: masks whose transpose is 2:4 too, so that both matmuls of backward can use it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from fxsparse.errors import PatternError
from fxsparse.pattern import PATTERNS, Tiles
from fxsparse.selection import to_positions
from fxsparse.topk import top_mask


@lru_cache(maxsize=1)
def masks_4x4() -> Tensor:
    """The 90 masks of 4 x 4 with two ones in every row and column, [90, 16] float64; ones at lower places first."""
    rows = [tuple(float(k in two) for k in range(4)) for two in combinations(range(4), 2)]
    found = [m for m in product(rows, repeat=4) if all(sum(column) == 2 for column in zip(*m, strict=True))]
    return torch.tensor(found, dtype=torch.float64).view(len(found), 16)


@dataclass(frozen=True)
class Transposable:
    """Two ones in every row and every column of 4 output rows x 4 input channels, whatever the nnz asked for: Hu et al.
    2024, arXiv:2404.01847, after Hubara et al. 2021, arXiv:2102.08124.

    Of the 90 masks of a block the one with the largest sum of scores is taken, exactly; of equal ones the first in
    which a one comes earlier.  `check` lets blocks with fewer ones pass, as the hardware does.
    """

    row_local: ClassVar[bool] = False
    streams: ClassVar[bool] = False

    def feasible(self, shape: Sequence[int], nnz: int) -> int:
        if nnz < 0:
            raise PatternError(f"expected nnz >= 0, got {nnz}.")
        _blocks(shape)
        return prod(shape) // 2

    def project(self, score: Tensor, nnz: int) -> Tensor:
        total = self.feasible(score.shape, nnz)
        precise = score.detach().double()
        # A forced entry outweighs all others of its block, and one that is kept out costs as much.
        finite = precise.masked_fill(precise.isinf(), 0).abs().amax() * 32 + 1 if precise.numel() else 1.0
        blocks = _to_blocks(torch.where(precise.isinf(), precise.sign() * finite, precise))
        masks = masks_4x4().to(score.device)
        chosen = _from_blocks(masks[(blocks @ masks.t()).argmax(1)].bool(), score.shape)
        kept = chosen & (score > -torch.inf)
        if int(kept.sum()) != total:
            raise PatternError(
                f"expected {total} entries for {self}, got only {int(kept.sum())} with a score above -inf. "
                "Keep fewer entries out."
            )
        return chosen

    def project_tiles(self, tiles: Tiles, shape: Sequence[int], nnz: int) -> Tensor:
        whole = torch.cat([scores for _, scores in tiles]).reshape(tuple(shape))
        return to_positions(self.project(whole, nnz))

    def prune(self, score: Tensor, active: Tensor, shape: Sequence[int], keep: int) -> Tensor:
        return top_mask(score, keep)

    def check(self, mask: Tensor) -> None:
        blocks = _to_blocks(mask.double()).view(-1, 4, 4)
        worst = torch.maximum(blocks.sum(1).amax(1), blocks.sum(2).amax(1))
        bad = to_positions(worst > 2)
        if len(bad):
            row, channel, kernel = torch.unravel_index(bad[0].cpu(), _blocks(mask.shape))
            raise PatternError(
                f"expected at most 2 ones in every row and column of 4 x 4, got {int(worst[bad[0]])} in the block at "
                f"row {int(row) * 4}, channel {int(channel) * 4}, kernel position {int(kernel)}. Project the mask with "
                "Transposable().project."
            )


def _blocks(shape: Sequence[int]) -> tuple[int, int, int]:
    """Blocks of rows, of input channels, and kernel positions."""
    if len(shape) < 2 or not all(shape) or shape[0] % 4 or shape[1] % 4:
        raise PatternError(
            f"expected a weight with multiples of 4 output rows and input channels, got shape {list(shape)}; "
            "Transposable() takes blocks of 4 x 4. Exclude this weight, or give it NM(2, 4) by an Override."
        )
    return shape[0] // 4, shape[1] // 4, prod(shape[2:])


def _to_blocks(tensor: Tensor) -> Tensor:
    """[blocks, 16], the row of a block before its channel."""
    rows, channels, kernel = _blocks(tensor.shape)
    return tensor.reshape(rows, 4, channels, 4, kernel).permute(0, 2, 4, 1, 3).reshape(-1, 16)


def _from_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    rows, channels, kernel = _blocks(shape)
    return blocks.view(rows, channels, kernel, 4, 4).permute(0, 3, 1, 4, 2).reshape(tuple(shape))


PATTERNS["transposable"] = Transposable
