"""Condensed: constant fan-in as a rectangle of values and one of column numbers (SRigL, arXiv:2305.02299)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.errors import PatternError

_INT16_MAX = 32767


def fan_in(mask: Tensor) -> int | None:
    """Entries of every nonempty row of `mask` [out, in] where that is one number, else None; 0 without entries."""
    counts = mask.sum(1)
    counts = counts[counts > 0]
    if not bool((counts == counts[:1]).all()):
        return None
    return int(counts[0]) if counts.numel() else 0


def pack(weight: Tensor, mask: Tensor | None = None) -> Mapping[str, Tensor]:
    """``values`` [active, k] and ascending column ``indices`` [active, k] of the nonempty rows of a `weight` [out, in].

    Indices are int16 up to 32,767 inputs, else int32.  Where some rows are empty (ablated neurons), ``active_rows`` and
    ``empty_rows`` (int32, ascending) name both kinds.  The entries are those of `mask`, whatever their value, else the
    nonzero ones; PatternError names the first row whose count differs.
    """
    mask = weight != 0 if mask is None else mask
    k = fan_in(mask)
    if k is None:
        counts = mask.sum(1)
        first, row = (int(rows[0]) for rows in _two_counts(counts))
        raise PatternError(
            f"condensed needs one fan-in for all rows that are not empty; row {first} has {int(counts[first])} "
            f"nonzeros, row {row} has {int(counts[row])}. Use CSR, or the ConstantFanIn pattern"
        )
    active = mask.any(1)
    columns = mask.nonzero()[:, 1].reshape(int(active.sum()), k)
    dtype = torch.int16 if mask.shape[1] <= _INT16_MAX else torch.int32
    packed = {"values": weight[active].gather(1, columns), "indices": columns.to(dtype)}
    if bool(active.all()):
        return packed
    return packed | {"active_rows": rows_of(active), "empty_rows": rows_of(~active)}


def pack_entries(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Mapping[str, Tensor]:
    """What `pack` makes, from the nonzeros: values [nnz] and int32 rows and columns [2, nnz] of a weight [out, in].

    The entries are by row, then by column, and every nonempty row has as many.
    """
    filled = torch.bincount(indices[0], minlength=shape[0]) > 0
    active = int(filled.sum())
    narrow = torch.int16 if shape[1] <= _INT16_MAX else torch.int32
    packed = {
        "values": values.reshape(active, -1 if active else 0),
        "indices": indices[1].to(narrow, copy=True).reshape(active, -1 if active else 0),
    }
    return (
        packed
        if active == shape[0]
        else packed | {"active_rows": rows_of(filled), "empty_rows": rows_of(~filled)}
    )


def to_dense(
    values: Tensor,
    indices: Tensor,
    active_rows: Tensor | None = None,
    empty_rows: Tensor | None = None,
    *,
    in_features: int,
) -> Tensor:
    """The dense weight [out, in_features] with zeros filled in."""
    active = values.new_zeros(values.shape[0], in_features).scatter_(1, indices.long(), values)
    if active_rows is None or empty_rows is None:
        return active
    dense = values.new_zeros(len(active_rows) + len(empty_rows), in_features)
    return dense.index_copy_(0, active_rows.long(), active)


def rows_of(mask: Tensor) -> Tensor:
    """Positions of the true entries of `mask` [out], int32."""
    return mask.nonzero().squeeze(1).to(torch.int32)


def _two_counts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The nonempty rows with the first count, and those with another."""
    filled = counts[counts > 0]
    return (
        (counts == filled[0]).nonzero().squeeze(1),
        ((counts > 0) & (counts != filled[0])).nonzero().squeeze(1),
    )
