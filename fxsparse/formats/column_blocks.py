"""CSR in blocks of columns: a panel of the inputs that one block reads fits a CPU's L2 cache, at short indices."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = 2304
"""Columns of a block at most; the blocks of a matrix are as equally wide as they can be."""


@dataclass(frozen=True)
class ColumnBlocks:
    """The nonzeros of a matrix, block by block, and in a block row by row with ascending columns."""

    values: Tensor
    """[nnz], fp32, or fp64 of such a matrix."""
    start: Tensor
    """[blocks, rows + 1], int32: the entries of row r in block b are those from start[b, r] to start[b, r + 1]."""
    columns: Tensor
    """[nnz], int16, from the block's first column on."""


def from_dense(matrix: Tensor, widest: int = WIDEST) -> ColumnBlocks:
    """The nonzeros of a dense matrix [rows, columns], in blocks of at most `widest` columns."""
    rows, columns = matrix.nonzero().unbind(1)
    return from_entries(matrix[rows, columns], rows, columns, (matrix.shape[0], matrix.shape[1]), widest)


def from_entries(
    values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int], widest: int = WIDEST
) -> ColumnBlocks:
    """The entries of a matrix of `shape`, given by row and then by column, each [nnz]."""
    height, wide = shape[0], width(shape[1], widest)
    block = columns // wide
    order = torch.argsort(block, stable=True)
    blocks = max(1, -(-shape[1] // wide))
    counts = torch.bincount(block.long() * height + rows, minlength=blocks * height)
    ends = F.pad(counts.cumsum(0), (1, 0))
    return ColumnBlocks(
        values[order].to(torch.promote_types(values.dtype, torch.float32)),
        torch.stack([ends[b * height : (b + 1) * height + 1] for b in range(blocks)]).int(),
        (columns % wide)[order].to(torch.int16),
    )


def to_dense(blocks: ColumnBlocks, columns: int) -> Tensor:
    """The dense matrix [rows, columns], in the values' dtype."""
    count, rows = blocks.start.shape[0], blocks.start.shape[1] - 1
    entries = torch.repeat_interleave(blocks.start.diff(dim=1).flatten().long())
    position = blocks.columns.long() + entries // max(1, rows) * -(-columns // count)
    matrix = blocks.values.new_zeros(rows, columns)
    return matrix.index_put((entries % max(1, rows), position), blocks.values)


def width(columns: int, widest: int = WIDEST) -> int:
    """Columns of every block but the last, at most `widest`."""
    count = max(1, -(-columns // widest))
    return max(1, -(-columns // count))
