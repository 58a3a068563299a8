"""The gradient of a linear layer's weight at some of its entries, and nowhere else."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.kernels.csr import reference
from fxsparse.kernels.library import define, is_compiled, on_gpu
from fxsparse.kernels.probe import flattened


def gradient_at(pairs: Sequence[tuple[Tensor, Tensor]], positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """``sum of grad_y^T x`` at flat `positions` (int64 [n], ascending) of a weight [out, in]: [n], in at least fp32.

    `pairs` are (x [..., in], grad_y [..., out]), one for each backward.  Time and memory grow with the tokens and
    with n; nothing has the size of the weight.
    """
    crow, cols = row_index(positions, shape)
    total = None
    for x, grad in flattened(pairs):
        run = torch.ops.fxsparse.csr_sample.default if is_compiled(x) else reference.sampled_product
        part = run(grad, x, crow, cols)
        total = part if total is None else total.add_(part)
    assert total is not None, "a weight that was not probed has no gradient"
    return total


def row_index(positions: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row pointers [out + 1] and columns [n], both int32, of flat `positions`, ascending, in a weight [out, in]."""
    rows, columns = shape
    starts = torch.arange(rows + 1, device=positions.device) * columns
    return torch.searchsorted(positions, starts, out_int32=True), (positions % columns).int()


def _fake(grad: Tensor, x: Tensor, crow: Tensor, cols: Tensor) -> Tensor:
    return grad.new_empty(cols.shape, dtype=torch.float32)


define(
    "csr_sample(Tensor grad, Tensor x, Tensor crow, Tensor cols) -> Tensor", reference.sampled_product, _fake
)


def _on_gpu(*args: Tensor) -> Tensor:
    from fxsparse.kernels.csr import backward_triton

    return backward_triton.forward(*args)


on_gpu("csr_sample", _on_gpu)


@register_flop_formula(torch.ops.fxsparse.csr_sample)
def _flops(grad_shape, x_shape, crow_shape, cols_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * cols_shape[0] * grad_shape[0]
