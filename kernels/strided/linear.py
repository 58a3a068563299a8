"""Inference of linear layers with a strided 1:M weight: that of N:M weights, on inputs sorted by groups."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import strided
from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels import cpu
from fxsparse.kernels.library import (
    ACTIVATIONS,
    COMPILED,
    autocast_stored,
    check_input,
    define,
    dense_product,
    with_epilogue,
)

_MOST_STORED = 2.0
"""Slots to a nonzero: where zeros are stored beyond that, other formats have fewer bytes and products."""


def strided_linear(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` [..., out], W from ``formats.strided.pack``; inference only.

    x [..., in], values and residual [..., out] are of one floating dtype; values with `scales` [out] are as
    ``formats.narrow`` has them.  Free slots multiply an input by 0, as a dense weight does.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    x, values, scales, bias = autocast_stored(x, values, scales, bias)
    run = reference if x.dtype not in COMPILED else _FORWARD
    return with_epilogue(run, x, (values, places, dense), bias, activation, residual, scales)


def reference(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch on the dense weight, differentiable."""
    check_input(x, values, dense.shape[2], scales)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = strided.to_dense(values.to(wide), places, dense)
    weight = weight if scales is None else weight * scales.to(wide)[:, None]
    return dense_product(x, weight, bias, activation, residual)


def _fake(x, values, places, dense, bias, activation, residual=None, scales=None):
    check_input(x, values, dense.shape[2], scales)
    return x.new_empty(*x.shape[:-1], dense.shape[1])


define(
    "strided_forward(Tensor x, Tensor values, Tensor places, Tensor dense, Tensor? bias, int activation, "
    "Tensor? residual=None, Tensor? scales=None) -> Tensor",
    reference,
    _fake,
)

_FORWARD = torch.ops.fxsparse.strided_forward.default  # once: the way through torch.ops takes 0.2 us


@register_flop_formula(torch.ops.fxsparse.strided_forward)
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    """Of all slots, the free ones too: shapes are all that a formula sees."""
    return 2 * values_shape.numel() * torch.Size(x_shape[:-1]).numel()


def _run(
    x, bias, *packed, activation: str = "none", residual: Tensor | None = None, in_features: int | None = None
) -> Tensor:
    return strided_linear(x, *packed[:3], bias, activation, residual, *packed[3:])


def _reference(
    x, bias, *packed, activation: str = "none", residual: Tensor | None = None, in_features: int | None = None
) -> Tensor:
    return reference(x, *packed[:3], bias, ACTIVATIONS.index(activation), residual, *packed[3:])


def _refuses(problem: Problem) -> list[str]:
    reasons = cpu.refuses(problem) + (["it has no gradient"] if problem.training else [])
    if problem.strides is None:
        return [*reasons, f"the zeros are not strided 1:M, M from 2 to {strided.MOST}"]
    stored = torch.Size(problem.shape).numel() / problem.strides / max(1, problem.nnz)
    return reasons + (
        [f"as strided 1:{problem.strides} it would store {stored:.1f} slots a nonzero"]
        if stored > _MOST_STORED
        else []
    )


def _cost(problem: Problem) -> Cost:
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * problem.dtype.itemsize + problem.nnz // 2)


STRIDED = register(
    Kernel("cpu-strided", "linear", "strided", strided.pack, _run, _reference, _refuses, _cost)
)
