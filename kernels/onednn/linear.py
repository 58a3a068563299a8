"""The dense product of oneDNN for inference, which ``F.linear`` in float32 leaves to another library (MKL)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels.library import (
    COMPILED,
    activation_code,
    autocast,
    check_input,
    define,
    dense_product,
    refuse_gradient,
)
from fxsparse.kernels.onednn.attributes import ATTRIBUTES, refusals


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(F.linear(x, weight, bias))``, the activation on the way out; inference only.

    x [..., in], weight [out, in] and bias [out] are of one dtype, float32 or bfloat16, on the CPU.

    Raises:
        UnsupportedError: an input that requires a gradient.
        RuntimeError: an x of another width or dtype than the weight's.
    """
    refuse_gradient(x, weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    code = activation_code(activation)
    if torch.compiler.is_compiling():  # inductor takes packed weights only in the place of this op
        return torch.ops.fxsparse.onednn_linear.default(x, weight, bias, code)
    return _product(x, weight, bias, code)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """The op in plain PyTorch, in at least fp32."""
    check_input(x, weight, weight.shape[1])
    return dense_product(x, weight.to(torch.promote_types(x.dtype, torch.float32)), bias, activation)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    if not x.is_cpu or x.dtype not in COMPILED or x.numel() == 0:
        return reference(x, weight, bias, activation)
    check_input(x, weight, weight.shape[1])
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, *ATTRIBUTES[activation])


def _fake(x, weight, bias, activation):
    check_input(x, weight, weight.shape[1])
    return x.new_empty(*x.shape[:-1], weight.shape[0])


define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, int activation) -> Tensor", _product, _fake)


@register_flop_formula([torch.ops.fxsparse.onednn_linear, torch.ops.mkldnn._linear_pointwise])
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * torch.Size(weight_shape).numel() * torch.Size(x_shape[:-1]).numel()


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight}


def _run(x, bias, weight, activation: str = "none", *, in_features: int | None = None) -> Tensor:
    return onednn_linear(x, weight, bias, activation)


def _reference(x, bias, weight, activation: str = "none", *, in_features: int | None = None) -> Tensor:
    return reference(x, weight, bias, activation_code(activation))


def _cost(problem: Problem) -> Cost:
    numel = problem.shape[0] * problem.shape[1]
    return Cost(2 * problem.batch * numel, numel * problem.dtype.itemsize)


ONEDNN = register(Kernel("onednn", "linear", "dense", _pack, _run, _reference, refusals, _cost))
