"""Inference of linear layers whose zeros lie in blocks: a block's inputs are loaded once for four of its rows."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import bsr
from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels import cpu, gpu
from fxsparse.kernels.library import (
    ACTIVATIONS,
    COMPILED,
    autocast,
    check_input,
    define,
    dense_product,
    on_gpu,
    with_epilogue,
)


def bsr_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    columns: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` [..., out] for W from ``formats.bsr.pack``; inference only.

    x [..., in], values and residual [..., out] are of one floating dtype.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    x, values, bias = autocast(x, values, bias)
    known = gpu.DTYPES if x.is_cuda else COMPILED
    run = reference if x.dtype not in known else torch.ops.fxsparse.bsr_forward.default
    return with_epilogue(run, x, (values, crow, columns, dense), bias, activation, residual)


def reference(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    columns: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch on the dense weight, differentiable."""
    check_input(x, values, dense.shape[2])
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = bsr.to_dense(values.to(wide), crow, columns, dense)
    return dense_product(x, weight, bias, activation, residual)


def _fake(x, values, crow, columns, dense, bias, activation, residual=None):
    check_input(x, values, dense.shape[2])
    return x.new_empty(*x.shape[:-1], dense.shape[1])


define(
    "bsr_forward(Tensor x, Tensor values, Tensor crow, Tensor columns, Tensor dense, Tensor? bias, int activation, "
    "Tensor? residual=None) -> Tensor",
    reference,
    _fake,
)


def _on_gpu(*args):
    from fxsparse.kernels.bsr import _triton

    return _triton.forward(*args)


on_gpu("bsr_forward", _on_gpu)


@register_flop_formula(torch.ops.fxsparse.bsr_forward)
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * torch.Size(values_shape).numel() * torch.Size(x_shape[:-1]).numel()


def _run(
    x, bias, *packed, activation: str = "none", residual: Tensor | None = None, in_features: int | None = None
) -> Tensor:
    return bsr_linear(x, *packed, bias, activation, residual)


def _reference(
    x, bias, *packed, activation: str = "none", residual: Tensor | None = None, in_features: int | None = None
) -> Tensor:
    return reference(x, *packed, bias, ACTIVATIONS.index(activation), residual)


def _refuses(problem: Problem) -> list[str]:
    reasons = cpu.refuses(problem) + (["it has no gradient"] if problem.training else [])
    return reasons + ([] if problem.is_blocked else ["zeros do not lie in blocks"])


def _cost(problem: Problem) -> Cost:
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * problem.dtype.itemsize)


def _refuses_on_gpu(problem: Problem) -> list[str]:
    reasons = gpu.refuses(problem) + (["it has no gradient"] if problem.training else [])
    return reasons + ([] if problem.is_blocked else ["zeros do not lie in blocks"])


BSR = register(Kernel("cpu-bsr", "linear", "bsr", bsr.pack, _run, _reference, _refuses, _cost))
BSR_ON_GPU = register(
    Kernel(
        "cuda-bsr",
        "linear",
        "bsr",
        partial(bsr.pack, blocks=bsr.TENSOR_BLOCKS, paired=False),
        _run,
        _reference,
        _refuses_on_gpu,
        _cost,
    )
)
