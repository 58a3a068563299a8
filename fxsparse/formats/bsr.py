"""BSR: whole blocks of a weight, for masks that keep or drop them together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BLOCKS = ((32, 32), (16, 16), (8, 8), (4, 4), (2, 2), (1, 16), (1, 8), (1, 4), (16, 1), (8, 1), (4, 1))
"""Rows and columns of the blocks that are looked for, the largest first."""

TENSOR_BLOCKS = ((128, 128), (64, 64), (32, 32), (16, 16))
"""Those that tensor cores multiply."""


def block_of(mask: Tensor, blocks: Sequence[tuple[int, int]] = BLOCKS) -> tuple[int, int]:
    """The first of `blocks` that are all ones or all zeros in `mask` [out, in, ...], else (1, 1)."""
    # The first rows tell most masks apart, at a fraction of the time.
    return next(
        (b for b in blocks if _is_blocked(mask[: max(32, b[0])], *b) and _is_blocked(mask, *b)), (1, 1)
    )


def pack(
    weight: Tensor, blocks: Sequence[tuple[int, int]] = BLOCKS, paired: bool = True
) -> Mapping[str, Tensor]:
    """The blocks of a `weight` [out, in] that hold anything, by block row, then column.

    ``values`` [blocks, columns of a block, rows of a block], ``crow`` int32 [block rows + 1], ``columns`` int32
    [blocks], counted in blocks, and ``dense`` uint8 [0, out, in], which only says the shape.  In bfloat16 and with
    `paired` the values of two columns lie together, [blocks, columns / 2, rows, 2], since processors multiply them so;
    not where a block has an odd number of columns.
    """
    mask = weight != 0
    rows, columns = block_of(mask, blocks)
    tiles = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns).permute(
        0, 2, 3, 1
    )
    kept = (tiles != 0).flatten(2).any(2)
    crow = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=weight.device)
    crow[1:] = kept.sum(1).cumsum(0)
    values = tiles[kept]
    if paired and weight.dtype == torch.bfloat16 and columns % 2 == 0:
        values = values.unflatten(1, (columns // 2, 2)).transpose(2, 3)
    return {
        "values": values.contiguous(),
        "crow": crow,
        "columns": kept.nonzero()[:, 1].to(torch.int32),
        "dense": torch.empty(0, *weight.shape, dtype=torch.uint8, device=weight.device),
    }


def to_dense(values: Tensor, crow: Tensor, columns: Tensor, dense: Tensor) -> Tensor:
    """The weight [out, in] that `pack` took apart; differentiable in `values`."""
    if values.dim() == 4:
        values = values.transpose(2, 3).flatten(1, 2)
    _, width, height = values.shape
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff().long())
    tiles = values.new_zeros(dense.shape[1] // height, dense.shape[2] // width, width, height)
    tiles = tiles.index_put((rows, columns.long()), values)
    return tiles.permute(0, 3, 1, 2).reshape(dense.shape[1:])


def _is_blocked(mask: Tensor, rows: int, cols: int) -> bool:
    """Every block is all ones or all zeros."""
    if mask.shape[0] % rows or mask.shape[1] % cols:
        return False
    blocks = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1] // cols, cols, -1)
    return torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
