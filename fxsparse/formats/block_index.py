"""Blocks in a CSR index: what block kernels read of a weight whose values stay in row-major order."""

import torch
from torch import Tensor

from fxsparse.errors import PatternError
from fxsparse.formats import bsr, csr

PARTS = ("to_blocks", "to_entries", "crow", "columns", "dense", "order", "ccol", "rows_t", "perm", "order_t")
"""What `of_csr` gives, in the order in which kernels take it."""


def of_flat(flat: Tensor, shape: tuple[int, int], capacity: int, side: int) -> dict[str, Tensor]:
    """`of_csr` of the entries at flat positions (int64 [nnz], ascending) of a weight of `shape`."""
    return of_csr(csr.from_flat(flat, shape, capacity, transposed=False), side)


def of_csr(index: csr.CsrIndex, side: int) -> dict[str, Tensor]:
    """The blocks of `side` x `side` that the entries of `index` fill, as `bsr.pack_for_training` has them.

    ``to_blocks`` int32 [blocks, columns of a block, rows of a block] is the slot of each of their entries in the values
    [nnz] of `index`, and ``to_entries`` int32 [nnz] the opposite.  All sizes are those of any other mask of so many
    blocks.

    Raises:
        PatternError: entries that do not fill such blocks, or fewer of them than there is room for.
    """
    (rows, columns), area = index.shape, side * side
    count, steps = index.capacity // area, torch.arange(side, device=index.crow.device)
    crow = index.crow[::side] // area
    row = bsr.rows_of(crow, count).clamp(max=len(crow) - 2)
    begin, length = crow[row].long(), crow.diff()[row].long()
    first = begin * area + (torch.arange(count, device=crow.device) - begin) * side
    # Where there are other entries than in blocks these may be slots that do not exist.
    places = (first[:, None, None] + steps[:, None] + (length * side)[:, None, None] * steps).clamp(
        0, max(0, index.capacity - 1)
    )
    column = index.cols[places[:, 0, 0]] // side
    right = index.indices[0][places] == (row * side)[:, None, None] + steps
    right &= index.cols[places] == (column * side)[:, None, None] + steps[:, None]
    if count * area != index.capacity or rows % side or columns % side or not bool(right.all()):
        raise PatternError(
            f"expected {index.capacity} entries that fill blocks of {side} x {side} in the {rows} x {columns} weight, "
            f"which trains in such blocks; got others. Keep whole blocks, as Block({side}, {side}).project does."
        )
    to_blocks = places.int()
    to_entries = torch.empty(index.capacity, dtype=torch.int32, device=crow.device)
    to_entries[places.flatten()] = torch.arange(index.capacity, dtype=torch.int32, device=crow.device)
    dense = torch.empty(0, rows, columns, dtype=torch.uint8, device=crow.device)
    packed = {"values": to_blocks, "crow": crow, "columns": column.int(), "dense": dense}
    packed |= {"order": bsr.by_falling_length(crow), **bsr.by_column(packed)}
    return {"to_blocks": packed.pop("values"), "to_entries": to_entries, **packed}
