"""Lookup: entries side by side so that one vector instruction fetches their inputs from a table of 128.

A CPU with AVX-512 VBMI reads 64 bytes of a table of 128 at once.  So 64 rows are a group, each row a lane; a group has
bundles of one entry for each lane, and all entries of a bundle have their columns in one window of 128 inputs.
Windows start every 64 columns: a lane that is done with the first half of its window takes entries from the second, so
few slots stay empty (9 % at fan-in 741 of 3,072, 20 % at 307).  A column takes one byte: ``128 | column % 128``; an
empty slot has 0.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fxsparse.formats.condensed import rows_of

LANES = 64
WINDOW = 64
_USED = 128


class Entries(NamedTuple):
    """The entries of a weight by row, then column: int64 [nnz] each, and their values."""

    rows: Tensor
    columns: Tensor
    values: Tensor


def pack(weight: Tensor, mask: Tensor | None = None) -> Mapping[str, Tensor]:
    """The layout of a `weight` [out, in]; its entries are those of `mask`, else the nonzero ones.

    ``values`` [bundles, 64]; ``columns`` uint8 [bundles, 64], in the order of `byte_order`; ``counts`` uint8
    [groups, windows], the bundles of each window; ``starts`` int32 [groups + 1], the first bundle of each group;
    ``active_rows`` int32 [active], the rows in the order of the lanes, longest first; ``empty_rows`` int32.
    """
    mask = weight != 0 if mask is None else mask
    lengths = mask.sum(1)
    # Rows of one length share a group, so that none waits for a longer one.
    active = torch.argsort(lengths, descending=True, stable=True)[: int((lengths > 0).sum())]
    ordered = mask[active]
    taken, counts = _schedule(ordered)
    starts = torch.cat([counts.new_zeros(1), counts.sum(1).cumsum(0)])
    lanes, columns = ordered.nonzero().unbind(1)
    slots = _slots(taken, counts, starts, lanes, ordered.sum(1))
    size = int(starts[-1]) * LANES
    packed_columns = torch.zeros(size, dtype=torch.uint8)
    packed_columns[slots] = (columns % _USED + _USED).to(torch.uint8)
    return {
        "values": weight.new_zeros(size)
        .index_put_((slots,), weight[active][lanes, columns])
        .reshape(-1, LANES),
        "columns": packed_columns.reshape(-1, LANES)[:, byte_order()].contiguous(),
        "counts": counts.to(torch.uint8),
        "starts": starts.to(torch.int32),
        "active_rows": active.to(torch.int32),
        "empty_rows": rows_of(lengths == 0),
    }


def unpack(
    values: Tensor, columns: Tensor, counts: Tensor, starts: Tensor, active_rows: Tensor, empty_rows: Tensor
) -> Entries:
    """The entries of a packed weight."""
    groups, windows = counts.shape
    of_bundle = torch.repeat_interleave(torch.arange(groups * windows), counts.reshape(-1).long())
    by_slot = torch.empty_like(columns)
    by_slot[:, byte_order()] = columns
    bundle, slot = (by_slot >= _USED).nonzero().unbind(1)
    window = of_bundle[bundle] % max(1, windows)
    at = by_slot[bundle, slot].long() % _USED
    column = window * WINDOW + (at - window * WINDOW) % _USED
    row = active_rows.long()[of_bundle[bundle] // max(1, windows) * LANES + slot]
    order = torch.argsort(row * (windows + 1) * WINDOW + column)
    return Entries(row[order], column[order], values[bundle, slot][order])


def byte_order() -> Tensor:
    """[64]: which lane each byte of a bundle belongs to.

    Interleaving bytes, then pairs of bytes, within 128 bits puts byte ``16 q + 4 v + r`` into lane 4 q + r of vector v,
    which is lane ``16 v + 4 q + r`` of the group.
    """
    byte = torch.arange(LANES)
    return byte // 4 % 4 * 16 + byte // 16 * 4 + byte % 4


def _schedule(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries each row takes in each window, [groups, 64, windows], and the bundles, [groups, windows].

    Greedy: a window has the bundles that its slowest row needs to finish the window's first half.
    """
    rows, in_features = mask.shape
    groups, windows = -(-rows // LANES), -(-in_features // WINDOW)
    blocks = torch.zeros(groups * LANES, windows * WINDOW, dtype=torch.bool)
    blocks[:rows, :in_features] = mask
    ends = blocks.reshape(groups, LANES, windows, WINDOW).sum(3).cumsum(2)
    taken, counts = torch.zeros_like(ends), torch.zeros(groups, windows, dtype=torch.long)
    done = torch.zeros(groups, LANES, dtype=torch.long)
    for window in range(windows):
        needed = (ends[:, :, window] - done).amax(1)
        counts[:, window] = needed
        reach = ends[:, :, min(window + 1, windows - 1)]
        taken[:, :, window] = torch.minimum(reach - done, counts[:, window, None])
        done = done + taken[:, :, window]
    return taken, counts


def _slots(taken: Tensor, counts: Tensor, starts: Tensor, lanes: Tensor, lengths: Tensor) -> Tensor:
    """Position in the layout of every entry of the rows in order, [nnz]; `lanes`: the row of each."""
    windows = counts.shape[1]
    runs = taken.reshape(-1)  # by row, then window, as the entries are
    run = torch.repeat_interleave(torch.arange(runs.numel()), runs)
    step = torch.arange(len(lanes)) - (runs.cumsum(0) - runs)[run]
    first = (starts[:-1, None] + counts.cumsum(1) - counts).reshape(-1)
    bundle = first[lanes // LANES * windows + run % max(1, windows)] + step
    return bundle * LANES + lanes % LANES
