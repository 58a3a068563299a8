"""Inference of linear layers with constant fan-in, in the condensed layout."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import condensed
from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels import cpu
from fxsparse.kernels.csr import reference as csr_reference
from fxsparse.kernels.library import ACTIVATIONS, COMPILED, activation_code, autocast, define, refuse_gradient


def condensed_linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``activation(x @ W^T + bias)`` for W [out, in] with k nonzeros in every row; inference only.

    x [..., in] and values [out, k] are of one floating dtype; indices [out, k] are columns, int16 or int32.
    """
    x, values, bias = autocast(x, values, bias)
    code = activation_code(activation)
    refuse_gradient(x)
    if x.dtype not in COMPILED:
        return reference(x, values, indices, bias, code)
    return torch.ops.fxsparse.condensed_forward.default(x, values, indices, bias, code)


def reference(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """The same in plain PyTorch, differentiable."""
    out_features, k = values.shape
    crow = torch.arange(out_features + 1, device=values.device) * k
    return csr_reference.linear(x, values.reshape(-1), crow, indices.reshape(-1).long(), bias, activation)


def _fake(x, values, indices, bias, activation):
    return x.new_empty(*x.shape[:-1], values.shape[0])


define(
    "condensed_forward(Tensor x, Tensor values, Tensor indices, Tensor? bias, int activation) -> Tensor",
    reference,
    _fake,
)


@register_flop_formula(torch.ops.fxsparse.condensed_forward)
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * values_shape.numel() * torch.Size(x_shape[:-1]).numel()


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    return condensed.pack(weight)


def _run(x, bias, values, indices, activation: str = "none") -> Tensor:
    return condensed_linear(x, values, indices, bias, activation)


def _reference(x, bias, values, indices, activation: str = "none") -> Tensor:
    return reference(x, values, indices, bias, ACTIVATIONS.index(activation))


def _refuses(problem: Problem) -> list[str]:
    reasons = cpu.refuses(problem)
    if problem.training:
        reasons.append("it has no gradient")
    if problem.fan_in is None:
        reasons.append("rows have different numbers of nonzeros")
    return reasons


def _cost(problem: Problem) -> Cost:
    index_bytes = 2 if problem.shape[1] <= 32767 else 4
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * (problem.dtype.itemsize + index_bytes))


CONDENSED = register(Kernel("cpu-condensed", "linear", "condensed", _pack, _run, _reference, _refuses, _cost))
