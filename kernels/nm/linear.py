"""Inference of N:M and strided 1:M linear layers on the GPU: memory holds N of every M inputs, registers the zeros."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import nm, strided
from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels import gpu
from fxsparse.kernels.library import (
    ACTIVATIONS,
    autocast,
    check_input,
    define,
    dense_product,
    on_gpu,
    with_epilogue,
)

_MOST_STORED = 2.0
"""Slots to a nonzero: where zeros are stored beyond that, other formats have fewer bytes."""


def nm_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    group: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` [..., out] for W of ``nm.pack`` or ``strided.pack_rows``; inference.

    x [..., in], values and residual [..., out] are of one floating dtype; sums in fp32 (fp64 for fp64).  Zeros that
    fill up a group multiply an input by 0, as a dense weight does.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    x, values, bias = autocast(x, values, bias)
    run = torch.ops.fxsparse.nm_forward.default if x.dtype in gpu.DTYPES else reference
    return with_epilogue(run, x, (values, positions, group), bias, activation, residual)


def inputs_of(values: Tensor, group: Tensor) -> int:
    """How many inputs the weight has."""
    n, m, _ = nm.sizes_of(group)
    return values.shape[1] // n * m


def reference(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    group: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch on the dense weight, differentiable."""
    check_input(x, values, inputs_of(values, group))
    wide = torch.promote_types(x.dtype, torch.float32)
    return dense_product(x, nm.to_dense(values.to(wide), positions, group), bias, activation, residual)


def _fake(x, values, positions, group, bias, activation, residual=None):
    check_input(x, values, inputs_of(values, group))
    return x.new_empty(*x.shape[:-1], values.shape[0])


define(
    "nm_forward(Tensor x, Tensor values, Tensor positions, Tensor group, Tensor? bias, int activation, "
    "Tensor? residual=None) -> Tensor",
    reference,
    _fake,
)


def _on_gpu(*args):
    from fxsparse.kernels.nm import _triton

    return _triton.forward(*args)


on_gpu("nm_forward", _on_gpu)


@register_flop_formula(torch.ops.fxsparse.nm_forward)
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    """Of the stored values: what a dense tile multiplies besides is no FLOP of the weight."""
    return 2 * torch.Size(values_shape).numel() * torch.Size(x_shape[:-1]).numel()


def _run(
    x,
    bias,
    values,
    positions,
    group,
    activation: str = "none",
    residual: Tensor | None = None,
    in_features: int | None = None,
) -> Tensor:
    return nm_linear(x, values, positions, group, bias, activation, residual)


def _reference(
    x,
    bias,
    values,
    positions,
    group,
    activation: str = "none",
    residual: Tensor | None = None,
    in_features: int | None = None,
) -> Tensor:
    return reference(x, values, positions, group, bias, ACTIVATIONS.index(activation), residual)


def _refuses(problem: Problem) -> list[str]:
    reasons = gpu.refuses(problem) + (["it has no gradient"] if problem.training else [])
    if problem.group is None:
        return [*reasons, "the zeros are not N:M"]
    n, m = problem.group
    return reasons + _too_empty(problem, n / m, f"{n}:{m}")


def _refuses_strided(problem: Problem) -> list[str]:
    reasons = gpu.refuses(problem) + (["it has no gradient"] if problem.training else [])
    m = problem.strides
    if m is None or m & (m - 1):
        return [*reasons, "the zeros are not strided 1:M, M a power of 2 up to 16"]
    return reasons + _too_empty(problem, 1 / m, f"strided 1:{m}")


def _too_empty(problem: Problem, density: float, name: str) -> list[str]:
    stored = torch.Size(problem.shape).numel() * density / max(1, problem.nnz)
    return [f"as {name} it would store {stored:.1f} slots a nonzero"] if stored > _MOST_STORED else []


def _cost(problem: Problem) -> Cost:
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * (problem.dtype.itemsize + 1))


NM = register(Kernel("cuda-nm", "linear", "nm", nm.pack, _run, _reference, _refuses, _cost))
STRIDED = register(
    Kernel(
        "cuda-strided", "linear", "nm-strided", strided.pack_rows, _run, _reference, _refuses_strided, _cost
    )
)
