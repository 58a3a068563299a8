"""Condensed: constant fan-in as a rectangle of values and one of column numbers (SRigL, arXiv:2305.02299)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fxsparse.errors import PatternError

_INT16_MAX = 32767


def fan_in(mask: Tensor) -> int | None:
    """Nonzeros of every row of `mask` [out, in] where that is one number, else None."""
    counts = mask.sum(1)
    if counts.numel() == 0 or not bool((counts == counts[0]).all()):
        return None
    return int(counts[0])


def pack(weight: Tensor, mask: Tensor | None = None) -> Mapping[str, Tensor]:
    """``values`` [out, k] and ascending column ``indices`` [out, k] of a `weight` [out, in].

    Indices are int16 up to 32,767 inputs, else int32.  The entries are those of `mask`, else the nonzero
    ones; PatternError names the first row whose count differs.
    """
    mask = weight != 0 if mask is None else mask
    k = fan_in(mask)
    if k is None:
        counts = mask.sum(1).tolist()
        row = next((r for r, count in enumerate(counts) if count != counts[0]), 0)
        raise PatternError(
            f"condensed needs one fan-in for all rows; row 0 has {counts[:1]} nonzeros, row {row} has "
            f"{counts[row : row + 1]}. Use CSR, or the ConstantFanIn pattern"
        )
    columns = mask.nonzero()[:, 1].reshape(mask.shape[0], k)
    dtype = torch.int16 if mask.shape[1] <= _INT16_MAX else torch.int32
    return {"values": weight.gather(1, columns), "indices": columns.to(dtype)}


def to_dense(values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """The dense weight [out, in_features] with zeros filled in."""
    return values.new_zeros(values.shape[0], in_features).scatter_(1, indices.long(), values)
