"""Inference of linear layers whose zeros lie in blocks: a block's inputs are loaded once for four of its rows."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import bsr
from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels import cpu, gpu
from fxsparse.kernels.bsr import reference
from fxsparse.kernels.library import (
    ACTIVATIONS,
    COMPILED,
    autocast,
    check_input,
    define,
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
    order: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` [..., out] for W from ``formats.bsr.pack``; inference only.

    x [..., in], values and residual [..., out] are of one floating dtype.  A GPU takes the block rows in `order`.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    x, values, bias = autocast(x, values, bias)
    known = gpu.DTYPES if x.is_cuda else COMPILED
    run: Any = reference.linear
    if x.dtype in known and order is None:
        run = torch.ops.fxsparse.bsr_forward.default
    elif x.dtype in known:
        run = partial(_in_order, order)
    return with_epilogue(run, x, (values, crow, columns, dense), bias, activation, residual)


def _in_order(order: Tensor | None, *given: Any) -> Tensor:
    residual = given[7] if len(given) > 7 else None
    return torch.ops.fxsparse.bsr_product.default(*given[:7], residual, order)


def _fake(x, values, crow, columns, dense, bias, activation, residual=None, order=None):
    check_input(x, values, dense.shape[2])
    return x.new_empty(*x.shape[:-1], dense.shape[1])


define(
    "bsr_forward(Tensor x, Tensor values, Tensor crow, Tensor columns, Tensor dense, Tensor? bias, int activation, "
    "Tensor? residual=None) -> Tensor",
    reference.linear,
    _fake,
)
define(
    "bsr_product(Tensor x, Tensor values, Tensor crow, Tensor columns, Tensor dense, Tensor? bias, int activation, "
    "Tensor? residual, Tensor? order) -> Tensor",
    reference.linear,
    _fake,
)


def _on_gpu(*args):
    if args[0].dtype not in gpu.DTYPES:  # kernels sum in fp32
        return reference.linear(*args)
    from fxsparse.kernels.bsr import _triton

    return _triton.forward(*args)


on_gpu("bsr_forward", _on_gpu)
on_gpu("bsr_product", _on_gpu)


@register_flop_formula([torch.ops.fxsparse.bsr_forward, torch.ops.fxsparse.bsr_product])
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * torch.Size(values_shape).numel() * torch.Size(x_shape[:-1]).numel()


def _run(
    x,
    bias,
    values,
    crow,
    columns,
    dense,
    order=None,
    activation: str = "none",
    residual: Tensor | None = None,
    in_features: int | None = None,
) -> Tensor:
    return bsr_linear(x, values, crow, columns, dense, bias, activation, residual, order)


def _reference(
    x,
    bias,
    values,
    crow,
    columns,
    dense,
    order=None,
    activation: str = "none",
    residual: Tensor | None = None,
    in_features: int | None = None,
) -> Tensor:
    code = ACTIVATIONS.index(activation)
    return reference.linear(x, values, crow, columns, dense, bias, code, residual)


def _refuses(problem: Problem) -> list[str]:
    reasons = cpu.refuses(problem) + (["it has no gradient"] if problem.training else [])
    return reasons + ([] if problem.is_blocked else ["zeros do not lie in blocks"])


def _cost(problem: Problem) -> Cost:
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * problem.dtype.itemsize)


def _refuses_on_gpu(problem: Problem) -> list[str]:
    reasons = gpu.refuses(problem) + (["it has no gradient: cuda-bsr-train has"] if problem.training else [])
    return reasons + ([] if problem.is_blocked else ["zeros do not lie in blocks"])


BSR = register(Kernel("cpu-bsr", "linear", "bsr", bsr.pack, _run, _reference, _refuses, _cost))
BSR_ON_GPU = register(
    Kernel(
        "cuda-bsr",
        "linear",
        "bsr",
        bsr.pack_for_inference,
        _run,
        _reference,
        _refuses_on_gpu,
        _cost,
    )
)
