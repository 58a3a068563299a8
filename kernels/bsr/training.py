"""Training of linear layers whose zeros lie in blocks: gradients of input, stored blocks and bias, and no others."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import block_index, bsr, csr
from fxsparse.kernel import TRAINING_IN_BLOCKS, Cost, Kernel, Problem, register
from fxsparse.kernels import gpu, probe
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
        return torch.ops.fxsparse.bsr_product.default(x, values, crow, columns, dense, bias, 0, None, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *weight = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 1, 10)]
        made = torch.ops.fxsparse.bsr_backward.default(grad, x, *weight, *needed)
        grad_x, grad_values, grad_bias = (t if need else None for t, need in zip(made, needed, strict=True))
        return grad_x, grad_values, *(None,) * 8, grad_bias


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
    if args[0].dtype not in gpu.DTYPES:  # kernels sum in fp32
        return reference.linear_backward(*args)
    from fxsparse.kernels.bsr import _triton

    return _triton.backward(*args)


on_gpu("bsr_backward", _on_gpu)


@register_flop_formula(torch.ops.fxsparse.bsr_backward)
def _flops(grad_shape, x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_values, _ = args[-3:]
    return (need_x + need_values) * 2 * torch.Size(values_shape).numel() * torch.Size(grad_shape[:-1]).numel()


class _InBlocks(torch.autograd.Function):
    """Values in row-major order as blocks; every place is read once, so that the gradient is a gather, too."""

    @staticmethod
    def forward(ctx, values, to_blocks, to_entries):
        ctx.save_for_backward(to_entries)
        return values.index_select(0, to_blocks.flatten()).view(to_blocks.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (to_entries,) = ctx.saved_tensors
        return grad.flatten().index_select(0, to_entries), None, None


def bsr_train(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    to_blocks: Tensor,
    to_entries: Tensor,
    *index: Tensor,
    activation: str = "none",
    probe_key: int = -1,
    in_features: int | None = None,
) -> Tensor:
    """`trainable_bsr_linear` of values [nnz] in row-major order, in the argument order of ``Kernel.run``.

    `to_blocks`, `to_entries` and `index` are ``formats.block_index.of_csr``.  With ``probe_key >= 0`` backward leaves
    copies of x and the output gradient in ``probe.PROBES[probe_key]``.
    """
    x, values, bias = autocast(x, values, bias)
    y = trainable_bsr_linear(x, _InBlocks.apply(values, to_blocks, to_entries), *index, bias)
    return y if probe_key < 0 else probe.watch(y, x, probe_key)


def _reference(
    x,
    bias,
    values,
    to_blocks,
    to_entries,
    crow,
    columns,
    dense,
    *index,
    activation: str = "none",
    in_features=None,
) -> Tensor:
    return reference.linear(x, values[to_blocks.long()], crow, columns, dense, bias, 0)


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    index = csr.from_mask(weight != 0)
    side, _ = bsr.block_of(weight != 0, bsr.TENSOR_BLOCKS)
    return {"values": csr.values_of(weight, index), **block_index.of_csr(index, side)}


def _refuses(problem: Problem) -> list[str]:
    reasons = gpu.refuses(problem)
    reasons += [] if problem.training else ["it is for training: cuda-bsr needs less memory"]
    return reasons + ([] if problem.is_blocked else ["zeros do not lie in blocks"])


def _cost(problem: Problem) -> Cost:
    return Cost(6 * problem.batch * problem.nnz, problem.nnz * problem.dtype.itemsize)


BSR_TRAIN = register(
    Kernel(TRAINING_IN_BLOCKS["linear"], "linear", "bsr", _pack, bsr_train, _reference, _refuses, _cost)
)
