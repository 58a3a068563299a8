"""Striped: CSR by stripes of 128 columns, so that the inputs of a stripe stay in the L1 cache.

With 64 tokens a stripe of inputs takes 32 KiB.  Within a stripe the rows are ordered by their number of entries: the
loops over entries end where the processor predicts it.  Rows come in chunks of 512, whose sums stay in L2.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.errors import PatternError

STRIPE = 128
CHUNK = 512
_INT32_MAX = 2**31 - 1


def pack(weight: Tensor) -> Mapping[str, Tensor]:
    """The layout of the nonzeros of a `weight` [out, in]; see `pack_entries`."""
    indices = weight.nonzero().t()
    return pack_entries(weight[*indices], indices, (weight.shape[0], weight.shape[1]))


def pack_entries(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Mapping[str, Tensor]:
    """The layout of the `values` [nnz] at `indices` [2, nnz] (rows, columns; ascending) of a weight of `shape`.

    A tile is a chunk of rows in a stripe; tiles are ordered by chunk, then stripe.  A tile has a segment for every row
    with entries in it, shortest first.  By segment: ``values`` [nnz] and ``columns`` uint8 [nnz] (from the first of the
    stripe), ``rows`` int16 (from the first of the chunk) and ``lengths`` uint8, both [segments]; ``starts`` int32
    [tiles + 1, 2], the first segment and entry of each tile; ``dense`` uint8 [0, out, in], which only says the shape.

    PatternError where there are more entries than an int32 counts.
    """
    out_features, in_features = shape
    row, column = indices.long()
    if len(row) > _INT32_MAX:
        raise PatternError(f"striped counts entries in int32, expected at most {_INT32_MAX}, got {len(row)}")
    chunks, stripes = -(-out_features // CHUNK), -(-in_features // STRIPE)
    tile = row // CHUNK * stripes + column // STRIPE
    segment, length = torch.unique(tile * CHUNK + row % CHUNK, return_counts=True)
    by_length = torch.argsort(segment // CHUNK * (STRIPE + 1) + length, stable=True)
    place = torch.empty_like(by_length)
    place[by_length] = torch.arange(len(by_length))
    of_entry = torch.searchsorted(segment, tile * CHUNK + row % CHUNK)
    order = torch.argsort(place[of_entry], stable=True)
    segment, length = segment[by_length], length[by_length]
    first = torch.searchsorted(segment // CHUNK, torch.arange(chunks * stripes + 1))
    entries = torch.cat([length.new_zeros(1), length.cumsum(0)])
    return {
        "values": values[order],
        "columns": (column[order] % STRIPE).to(torch.uint8),
        "rows": (segment % CHUNK).to(torch.int16),
        "lengths": length.to(torch.uint8),
        "starts": torch.stack([first, entries[first]], 1).to(torch.int32),
        "dense": torch.empty(0, out_features, in_features, dtype=torch.uint8),
    }


def positions(
    columns: Tensor, rows: Tensor, lengths: Tensor, starts: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """Row and column of every entry of a packed weight, int64 [nnz] each."""
    stripes = -(-dense.shape[2] // STRIPE)
    tile = torch.repeat_interleave(torch.arange(len(starts) - 1), starts[:, 0].diff().long())
    segment = torch.repeat_interleave(torch.arange(len(rows)), lengths.long())
    row = tile // max(1, stripes) * CHUNK + rows.long()
    return row[segment], (tile % max(1, stripes) * STRIPE)[segment] + columns.long()
