"""MVUE: the unbiased 2:4 estimate of output gradients, from which weight gradients are computed; arXiv:2203.10991."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.reparam import one_node
from fxsparse.rng import uniform_at

OTHERS = [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
"""Of each of four, the places of the other three."""


def keep_probabilities(size: Tensor) -> Tensor:
    """How likely `mvue24` keeps each of four magnitudes, [..., 4]; they sum to 2 where two are above 0."""
    total = size.sum(-1, keepdim=True)
    others = size[..., OTHERS].sum(-1)
    first = torch.where(total > 0, size / total, 0)
    after = torch.where(others > 0, first / others, 0)
    return first + size * after[..., OTHERS].sum(-1)


def mvue24(tensor: Tensor, numbers: Tensor) -> Tensor:
    """Two of every four of the last dimension, divided by how likely they are kept, so that its mean is `tensor`.

    The first is drawn in proportion to magnitude, the second likewise of what is left: the approximation of
    arXiv:2203.10991, section 4.  `numbers`: uniform in [0, 1), [2, ..., groups].
    """
    groups = tensor.reshape(*tensor.shape[:-1], -1, 4)
    size = groups.abs().to(torch.promote_types(tensor.dtype, torch.float32))
    likely = keep_probabilities(size)
    kept = torch.zeros_like(size, dtype=torch.bool)
    for number in numbers:
        left = size.masked_fill(kept, 0).cumsum(-1)
        place = (left <= number[..., None] * left[..., -1:]).sum(-1, keepdim=True).clamp_max(3)
        kept = kept.scatter(-1, place, True)
    scale = torch.where(kept & (likely > 0), 1 / likely.clamp_min(torch.finfo(size.dtype).tiny), 0)
    return (groups * scale.to(tensor.dtype)).reshape(tensor.shape)


@one_node
def mvue_linear(
    x: Tensor, effective: Tensor, bias: Tensor | None, mask: Tensor, beta: Tensor, step: Tensor, key: int
) -> Tensor:
    """``F.linear`` whose weight gradient is that of the output gradient made 2:4 along the samples by `mvue24`."""
    del mask, beta
    return _MvueLinear.apply(x, effective, bias, step, key)


class _MvueLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, effective: Tensor, bias: Tensor | None, step: Tensor, key: int
    ) -> Tensor:
        ctx.save_for_backward(x, effective, step.clone())
        ctx.key = key
        return F.linear(x, effective, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, effective, step = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        columns = F.pad(rows.t(), (0, -len(rows) % 4))
        numbers = uniform_at(step, ctx.key, (2, len(columns), columns.shape[1] // 4))
        thin = mvue24(columns, numbers)[:, : len(rows)]
        into = grads[0] @ effective.to(rows.dtype) if ctx.needs_input_grad[0] else None
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return into, thin @ x.reshape(len(rows), -1).to(rows.dtype), bias, None, None
