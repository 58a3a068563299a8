"""Products with blocks in plain PyTorch, through the dense weight: the oracle, and what runs without kernels."""

import torch
from torch import Tensor

from fxsparse.formats import bsr
from fxsparse.kernels.library import check_input, dense_product


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    columns: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)``, differentiable; no result depends on `order`.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    check_input(x, values, dense.shape[2])
    return dense_product(x, _dense(values, crow, columns, dense), bias, activation, residual)


def linear_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    columns: Tensor,
    dense: Tensor,
    ccol: Tensor,
    rows_t: Tensor,
    perm: Tensor,
    order_t: Tensor,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of values at the stored blocks, and of bias, sums in at least fp32; empty where not needed."""
    wide = torch.promote_types(x.dtype, torch.float32)
    upstream, inputs = (t.reshape(-1, t.shape[-1]).to(wide) for t in (grad, x))
    grad_x, grad_values, grad_bias = x.new_empty(0), values.new_empty(0), grad.new_empty(0)
    if need_x:
        grad_x = (upstream @ _dense(values, crow, columns, dense)).to(x.dtype).reshape(x.shape)
    if need_values:
        _, width, height = values.shape
        tiles = (inputs.T @ upstream).unflatten(1, (-1, height)).unflatten(0, (-1, width))
        grad_values = tiles[columns.long(), :, bsr.rows_of(crow, len(columns))].to(values.dtype)
    if need_bias:
        grad_bias = upstream.sum(0).to(grad.dtype)
    return grad_x, grad_values, grad_bias


def _dense(values: Tensor, crow: Tensor, columns: Tensor, dense: Tensor) -> Tensor:
    """The dense weight in at least fp32."""
    return bsr.to_dense(values.to(torch.promote_types(values.dtype, torch.float32)), crow, columns, dense)
