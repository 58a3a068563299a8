"""CSR products in plain PyTorch: the oracle of the C++ kernels, and what runs without them."""

import torch
from torch import Tensor

from fxsparse.kernels.library import ACTIVATIONS, activate, check_input

_GATHERED = 1 << 20
"""Entries that one step may gather, so that memory stays far below [tokens, nnz]."""


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` for W [out, in_features] in CSR; differentiable.

    With `scales` [out] row r of W is ``scales[r] * values``.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    check_input(x, values, in_features, scales)
    return product(x, values, crow, cols, bias, activation, residual, scales)


def product(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """What `linear` computes, for dtypes that may differ; sums in at least fp32."""
    flat = _accumulating(x.reshape(-1, x.shape[-1]))
    rows, cols, unused = entries(crow, cols)
    weight = values.to(flat.dtype).masked_fill(unused, 0)
    parts = [
        flat.new_zeros(len(part), crow.numel() - 1).index_add(
            1, rows, part[:, cols].masked_fill(unused, 0) * weight
        )
        for part in flat.split(tokens_per_step(values))
    ]
    y = torch.cat(parts)
    if scales is not None:
        y = y * scales.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if residual is not None:
        y = y + residual.reshape(y.shape).to(y.dtype)
    return (
        activate(y, ACTIVATIONS[activation]).to(x.dtype).reshape(*x.shape[:-1], -1 if len(y) else y.shape[1])
    )


def linear_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    ccol: Tensor,
    rows_t: Tensor,
    perm: Tensor,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, values (at the stored coordinates, else 0) and bias; empty where one is not needed."""
    flat_grad = _accumulating(grad.reshape(-1, grad.shape[-1]))
    flat = _accumulating(x.reshape(-1, x.shape[-1]))
    rows, cols, unused = entries(crow, cols)
    step = tokens_per_step(values)
    grad_x, grad_values, grad_bias = x.new_empty(0), values.new_empty(0), values.new_empty(0)
    if need_x:
        weight = values.to(flat.dtype).masked_fill(unused, 0)
        total = torch.zeros_like(flat)
        for into, part in zip(total.split(step), flat_grad.split(step), strict=True):
            into.index_add_(1, cols, part[:, rows].masked_fill(unused, 0) * weight)
        grad_x = total.to(x.dtype).reshape(x.shape)
    if need_values:
        grad_values = sampled_product(flat_grad, flat, crow, cols).to(values.dtype)
    if need_bias:
        grad_bias = flat_grad.sum(0).to(grad.dtype)
    return grad_x, grad_values, grad_bias


def sampled_product(grad: Tensor, x: Tensor, crow: Tensor, cols: Tensor) -> Tensor:
    """``grad^T x`` at the entries of a CSR index, [n], for grad [tokens, out] and x [tokens, in]; in at least fp32."""
    grad, x = _accumulating(grad), _accumulating(x)
    rows, cols, unused = entries(crow, cols)
    sums = x.new_zeros(cols.numel())
    step = tokens_per_step(cols)
    for part_grad, part in zip(grad.split(step), x.split(step), strict=True):
        sums += (part_grad[:, rows] * part[:, cols]).sum(0)
    return sums.masked_fill(unused, 0)


def entries(crow: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of every slot, int64 [capacity], and whether it holds no entry; then both are 0.

    Every shape is known before `crow` is read, so that compilers trace this.
    """
    slots = torch.arange(cols.numel(), device=crow.device)
    unused = slots >= crow[-1]
    rows = torch.searchsorted(crow.long(), slots, right=True) - 1
    return rows.masked_fill(unused, 0), cols.long().masked_fill(unused, 0), unused


def tokens_per_step(values: Tensor) -> int:
    """Tokens whose gathered entries fit the step limit."""
    return max(1, _GATHERED // max(1, values.numel()))


def _accumulating(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
