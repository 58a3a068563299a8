"""Training of linear layers whose zeros lie in blocks: gradients of input, stored blocks and bias, and no others."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import bsr
from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels import gpu
from fxsparse.kernels.bsr import reference
from fxsparse.kernels.library import autocast, define, on_gpu


def trainable_bsr_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    columns: Tensor,
    dense: Tensor,
    order: Tensor,
    ccol: Tensor,
    rows_t: Tensor,
    perm: Tensor,
    order_t: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``x @ W^T + bias`` for W from ``formats.bsr.pack_for_training``, differentiable in x, values and bias.

    x [..., in], values [blocks, columns of a block, rows of a block] and bias [out] are of one floating dtype; every
    index is int32.  The gradient of the values is that of W at the stored blocks; on a GPU no tensor of W's size is
    made, no values are copied into another order, and every sum has one order.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    x, values, bias = autocast(x, values, bias)
    return _BsrLinear.apply(x, values, crow, columns, dense, order, ccol, rows_t, perm, order_t, bias)


class _BsrLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, crow, columns, dense, order, ccol, rows_t, perm, order_t, bias):
        ctx.save_for_backward(x, values, crow, columns, dense, ccol, rows_t, perm, order_t)
        run: Any = _known(x, torch.ops.fxsparse.bsr_product.default, reference.linear)
        return run(x, values, crow, columns, dense, bias, 0, None, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *weight = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 1, 10)]
        run: Any = _known(x, torch.ops.fxsparse.bsr_backward.default, reference.linear_backward)
        made = run(grad, x, *weight, *needed)
        grad_x, grad_values, grad_bias = (t if need else None for t, need in zip(made, needed, strict=True))
        return grad_x, grad_values, *(None,) * 8, grad_bias


def _known(x: Tensor, op: Any, otherwise: Any) -> Any:
    """The op, or for other dtypes its reference: kernels sum in fp32."""
    return op if x.dtype in gpu.DTYPES else otherwise


def _fake(grad, x, values, crow, columns, dense, ccol, rows_t, perm, order_t, need_x, need_values, need_bias):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        values.new_empty(values.shape if need_values else (0,)),
        grad.new_empty(grad.shape[-1:] if need_bias else (0,)),
    )


define(
    "bsr_backward(Tensor grad, Tensor x, Tensor values, Tensor crow, Tensor columns, Tensor dense, Tensor ccol, "
    "Tensor rows_t, Tensor perm, Tensor order_t, bool need_x, bool need_values, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    reference.linear_backward,
    _fake,
)


def _on_gpu(*args):
    from fxsparse.kernels.bsr import _triton

    return _triton.backward(*args)


on_gpu("bsr_backward", _on_gpu)


@register_flop_formula(torch.ops.fxsparse.bsr_backward)
def _flops(grad_shape, x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_values, _ = args[-3:]
    return (need_x + need_values) * 2 * torch.Size(values_shape).numel() * torch.Size(grad_shape[:-1]).numel()


def _run(
    x,
    bias,
    values,
    crow,
    columns,
    dense,
    order,
    ccol,
    rows_t,
    perm,
    order_t,
    activation: str = "none",
    in_features: int | None = None,
) -> Tensor:
    return trainable_bsr_linear(x, values, crow, columns, dense, order, ccol, rows_t, perm, order_t, bias)


def _reference(
    x, bias, values, crow, columns, dense, *index, activation: str = "none", in_features: int | None = None
) -> Tensor:
    return reference.linear(x, values, crow, columns, dense, bias, 0)


def _refuses(problem: Problem) -> list[str]:
    reasons = gpu.refuses(problem)
    reasons += [] if problem.training else ["it is for training: cuda-bsr needs less memory"]
    return reasons + ([] if problem.is_blocked else ["zeros do not lie in blocks"])


def _cost(problem: Problem) -> Cost:
    return Cost(6 * problem.batch * problem.nnz, problem.nnz * problem.dtype.itemsize)


BSR_TRAIN = register(
    Kernel("cuda-bsr-train", "linear", "bsr", bsr.pack_for_training, _run, _reference, _refuses, _cost)
)
