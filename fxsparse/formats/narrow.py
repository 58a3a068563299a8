"""Narrow values: a weight's entries in fewer bytes than its dtype has, each row with a scale of its own.

int8 is symmetric: the largest magnitude of a row is 127 steps of its scale.  bfloat16 rounds each entry, and its scales
are 1.  Scales are in the weight's dtype, and so are the inputs that a narrow weight takes.
"""

import torch
from torch import Tensor

DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16}
"""What values can be stored in, by the name that a user gives."""

_MOST = 127


def rounded(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] in `dtype`, and its scales [out]: their product is the nearest to it that there is.

    Small entries may become 0.  What an fp32 weight is rounded to is rounded to itself, but for the last bit.
    """
    if dtype != torch.int8:
        return weight.to(dtype), weight.new_ones(len(weight))
    most = weight.abs().amax(1) if weight.numel() else weight.new_zeros(len(weight))
    return _in_steps(weight, _scales(most))


def rounded_entries(
    values: Tensor, rows: Tensor, out_features: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same of a weight by its entries: values [nnz] in `dtype`, and scales [out_features]."""
    if dtype != torch.int8:
        return values.to(dtype), values.new_ones(out_features)
    most = values.new_zeros(out_features).scatter_reduce(0, rows.long(), values.abs(), "amax")
    scales = _scales(most)
    return _in_steps(values[:, None], scales[rows.long()])[0][:, 0], scales


def nearest(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a `weight` [out, in] stored in `dtype` stands for, in at least fp32."""
    values, scales = rounded(weight, dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return values.to(wide) * scales.to(wide)[:, None]


def _scales(most: Tensor) -> Tensor:
    scales = most / _MOST
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _in_steps(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    # In fp32 at least: a quotient of 127 steps has to be told from 126.5 of them.
    wide = torch.promote_types(weight.dtype, torch.float32)
    steps = (weight.to(wide) / scales.to(wide)[:, None]).round().clamp(-_MOST, _MOST)
    return steps.to(torch.int8), scales
