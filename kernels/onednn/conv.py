"""The convolution of oneDNN on weights that it has put in the order it reads them in, for inference."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels.csr.conv import window
from fxsparse.kernels.library import COMPILED, activate, activation_code, autocast, refuse_gradient
from fxsparse.kernels.onednn.attributes import ATTRIBUTES, refusals
from fxsparse.kernels.second_copy import can_have_one, second_copy

_ORDERED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def onednn_conv2d(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    activation: str = "none",
    *,
    residual: Tensor | None = None,
    kernel_size: Any = None,
    in_channels: int | None = None,
    **arguments: Any,
) -> Tensor:
    """``activation(F.conv2d(x, weight, bias, **arguments) + residual)``, in the memory format of x; inference only.

    x [samples, in, height, width], weight, bias and residual are of one dtype, float32 or bfloat16, on the CPU; other
    inputs, and those that torch.compile sees, go through ``F.conv2d``.  The first call keeps a second copy of the
    weight, in oneDNN's order, for as long as the weight is there; a change of the weight that PyTorch counts makes it
    anew.

    Raises:
        UnsupportedError: an input that requires a gradient.
    """
    refuse_gradient(x, weight, bias, residual)
    x, weight, bias = autocast(x, weight, bias)
    if torch.compiler.is_compiling() or not _is_plain(x, weight, residual):
        y = F.conv2d(x, weight, bias, **arguments)
        return activate(y if residual is None else y + residual, activation)
    numbers = window(tuple(weight.shape[2:]), x.shape[1], **arguments)
    given = (numbers[4:6], numbers[2:4], numbers[8:10], numbers[10])
    last, ordered = _is_channels_last(x), _ordered(weight, given, x.shape)
    if (
        residual is None or residual.shape[2:].numel() == 1
    ):  # torch 2.11 cannot fuse the addition to single pixels
        code = activation_code(activation if residual is None else "none")
        y = torch.ops.mkldnn._convolution_pointwise.default(x, ordered, bias, *given, *ATTRIBUTES[code])
        y = y if residual is None else activate(y + residual, activation)
    else:
        fused = activation if activation in ("none", "relu") else "none"
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, ordered, bias, *given, "add", 1.0, None if fused == "none" else fused, [], None
        )
        y = y if fused == activation else activate(y, activation)
    return y if last else y.contiguous()


def _is_plain(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    alike = x.dtype == weight.dtype and (residual is None or residual.dtype == x.dtype)
    is_image = x.is_cpu and x.dtype in COMPILED and x.dim() == 4 and x.numel() > 0
    return alike and is_image and can_have_one(weight)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _ordered(weight: Tensor, given: tuple[Any, ...], size: torch.Size) -> Tensor:
    """The weight as oneDNN reads it for images of this size; made once."""

    def make() -> Tensor:
        last = weight.detach().contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._reorder_convolution_weight(last, *given, list(size))

    return second_copy(_ORDERED, weight, given, make)


def _reference(
    x, bias, weight, activation: str = "none", *, residual: Tensor | None = None, **arguments: Any
) -> Tensor:
    given = {k: v for k, v in arguments.items() if k not in ("kernel_size", "in_channels")}
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.conv2d(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide), **given)
    y = y if residual is None else y + residual.to(wide)
    return activate(y, activation).to(x.dtype)


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight}


def _refuses(problem: Problem) -> list[str]:
    reasons = refusals(problem)
    if len(problem.shape) != 4:
        return [*reasons, "it has two dimensions"]
    numbers = window(**dict(problem.arguments)) if problem.arguments else [0] * 12
    return reasons + (["its padding is the same on both sides"] if numbers[4:6] != numbers[6:8] else [])


def _cost(problem: Problem) -> Cost:
    numel = prod(problem.shape)
    return Cost(2 * problem.batch * numel, numel * problem.dtype.itemsize)


ONEDNN_CONV = register(
    Kernel("onednn-conv", "conv2d", "dense", _pack, onednn_conv2d, _reference, _refuses, _cost)
)
