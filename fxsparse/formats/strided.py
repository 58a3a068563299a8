"""Strided 1:M: a row of C entries has one in each of the C / M groups {g, g + C/M, g + 2 C/M, ...}."""

import torch
from torch import Tensor

from fxsparse.formats import condensed


def stride_of(mask: Tensor) -> int | None:
    """The M of strided 1:M where `mask` [out, in] has exactly one entry of every group in every nonempty row.

    None for any other, and where rows are full or have a single entry: that would fit every such row.
    """
    k = condensed.fan_in(mask)
    return None if k is None else groups_of(mask.nonzero()[:, 1], k, mask.shape[1])


def groups_of(columns: Tensor, fan_in: int, width: int) -> int | None:
    """`stride_of` of the nonempty rows' `columns` [rows * fan_in], one row after another, of a weight so wide."""
    if fan_in < 2 or width % fan_in or width == fan_in:
        return None
    groups = (columns.long() % fan_in).reshape(-1, fan_in).sort(1).values
    found = bool((groups == torch.arange(fan_in, device=columns.device)).all())
    return width // fan_in if found else None
