"""BSR: whole blocks of a weight, for masks that keep or drop them together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxsparse.errors import PatternError
from fxsparse.pattern import Block, Pattern

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


def side_of(pattern: Pattern) -> int | None:
    """The largest of TENSOR_BLOCKS that the blocks of `pattern` are made of; None where it has none."""
    if not isinstance(pattern, Block):
        return None
    return next((side for side, _ in TENSOR_BLOCKS if pattern.rows % side == pattern.cols % side == 0), None)


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


def pack_for_inference(weight: Tensor) -> dict[str, Tensor]:
    """What `pack` makes with TENSOR_BLOCKS, and ``order`` int32 [block rows]: the rows by falling length."""
    packed = pack(weight, TENSOR_BLOCKS, paired=False)
    return {**packed, "order": by_falling_length(packed["crow"])}


def pack_for_training(weight: Tensor) -> dict[str, Tensor]:
    """What `pack_for_inference` makes, and the same blocks `by_column`."""
    packed = pack_for_inference(weight)
    return packed | by_column(packed)


def by_column(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The blocks of `pack_for_inference` or `joined` by block column, then row.

    ``ccol`` [block columns + 1], ``rows_t`` [blocks], the block row of each, ``perm`` [blocks], its place in
    ``values``, and ``order_t`` [block columns], by falling length; all int32.
    """
    columns, perm = packed["columns"].sort(stable=True)
    across = packed["dense"].shape[2] // packed["values"].shape[1]
    ends = torch.arange(across + 1, dtype=torch.int32, device=columns.device)
    ccol = torch.searchsorted(columns, ends, out_int32=True)
    rows = rows_of(packed["crow"], len(columns))
    return {"ccol": ccol, "rows_t": rows[perm].int(), "perm": perm.int(), "order_t": by_falling_length(ccol)}


def joined(parts: Sequence[Mapping[str, Tensor]], share_input: bool = True) -> dict[str, Tensor]:
    """One weight of several small ones from `pack_for_inference`, so that one launch serves them all.

    Its outputs are theirs, one after another.  With `share_input` all read one input, as query, key and value do, else
    each reads its own, one after another.  Differentiable in their ``values``.

    Raises:
        PatternError: blocks of several sizes, or shared inputs of several widths.
    """
    blocks, widths = {p["values"].shape[1:] for p in parts}, [p["dense"].shape[2] for p in parts]
    if len(blocks) != 1 or (share_input and len(set(widths)) != 1):
        raise PatternError(
            f"expected weights with blocks of one size{' and inputs of one width' if share_input else ''}, got blocks "
            f"{[list(p['values'].shape[1:]) for p in parts]} and widths {widths}. Launch them one by one."
        )
    width, first_block, first_column = parts[0]["values"].shape[1], 0, 0
    crows, columns = [parts[0]["crow"][:1]], []
    for part in parts:
        crows.append(part["crow"][1:] + first_block)
        columns.append(part["columns"] + first_column)
        first_block += len(part["columns"])
        first_column += 0 if share_input else part["dense"].shape[2] // width
    crow, dense = torch.cat(crows), parts[0]["dense"]
    shape = 0, sum(p["dense"].shape[1] for p in parts), widths[0] if share_input else sum(widths)
    return {
        "values": torch.cat([p["values"] for p in parts]),
        "crow": crow,
        "columns": torch.cat(columns),
        "dense": dense.new_empty(shape),
        "order": by_falling_length(crow),
    }


def by_falling_length(pointers: Tensor) -> Tensor:
    """Positions of the rows that `pointers` [rows + 1] bound, the longest first, of equals the lower; int32."""
    return pointers.diff().argsort(stable=True, descending=True).int()


def rows_of(crow: Tensor, count: int) -> Tensor:
    """The block row of each of `count` blocks, int64; a GPU is not waited for."""
    blocks = torch.arange(count, dtype=torch.int32, device=crow.device)
    return torch.searchsorted(crow, blocks, right=True) - 1


def to_dense(values: Tensor, crow: Tensor, columns: Tensor, dense: Tensor) -> Tensor:
    """The weight [out, in] that `pack` took apart; differentiable in `values`."""
    if values.dim() == 4:
        values = values.transpose(2, 3).flatten(1, 2)
    _, width, height = values.shape
    tiles = values.new_zeros(dense.shape[1] // height, dense.shape[2] // width, width, height)
    tiles = tiles.index_put((rows_of(crow, len(columns)), columns.long()), values)
    return tiles.permute(0, 3, 1, 2).reshape(dense.shape[1:])


def _is_blocked(mask: Tensor, rows: int, cols: int) -> bool:
    """Every block is all ones or all zeros."""
    if mask.shape[0] % rows or mask.shape[1] % cols:
        return False
    blocks = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1] // cols, cols, -1)
    return torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))
