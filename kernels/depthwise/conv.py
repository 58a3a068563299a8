"""Convolutions with one filter a channel for inference, whatever zeros the filters have, and their kernel entry."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.kernel import OF_THE_WEIGHT, Cost, Kernel, Problem, register
from fxsparse.kernels import cpu
from fxsparse.kernels.csr import patches
from fxsparse.kernels.csr.conv import as_given, as_images, check_size, window
from fxsparse.kernels.library import (
    ACTIVATIONS,
    COMPILED,
    activate,
    activation_code,
    autocast,
    check_images,
    define,
    refuse_gradient,
)


def depthwise_conv(
    x: Tensor, bias: Tensor | None, weight: Tensor, activation: str = "none", **arguments: Any
) -> Tensor:
    """``activation(F.conv2d(x, weight, bias, ...))`` with as many groups as channels, of x and of weight; no gradient.

    `arguments` are kernel_size, in_channels, stride, padding, dilation and groups as of ``F.conv2d``, or ``F.conv1d``
    where kernel_size is one number.  x [samples, channels, *size], or one sample without the first dimension, is of one
    floating dtype with weight [channels, 1, *kernel_size] and bias [channels].  Sums are in fp32 (fp64 for fp64).  The
    result is contiguous.  What torch.compile sees is PyTorch's convolution: Inductor has a layout of its own for it.

    Raises:
        UnsupportedError: an input that requires a gradient.
        RuntimeError: an x of other channels or another dtype than the weight's.
        ValueError: an x of too few or too many dimensions, or smaller with its padding than the kernel.
    """
    refuse_gradient(x, weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    numbers, dimensions = window(**arguments), len(arguments["kernel_size"])
    check_size(x, arguments["kernel_size"], numbers)
    if torch.compiler.is_compiling():
        given = {name: value for name, value in arguments.items() if name not in OF_THE_WEIGHT}
        convolution: Any = F.conv1d if dimensions == 1 else F.conv2d
        return activate(convolution(x, weight, bias, **given), activation)
    images, added = as_images(x, dimensions)
    run: Any = reference if x.dtype not in COMPILED else torch.ops.fxsparse.depthwise_conv.default
    return as_given(run(images, weight, bias, activation_code(activation), numbers), added)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, window: Sequence[int]
) -> Tensor:
    """The op in plain PyTorch, on images and in at least fp32."""
    check_images(x, weight, window[11])
    top, left, bottom, right = window[4:8]
    wide = torch.promote_types(x.dtype, torch.float32)
    filters = weight.to(wide).view(-1, 1, *window[:2])
    added = None if bias is None else bias.to(wide)
    padded = F.pad(x.to(wide), (left, right, top, bottom))
    y = F.conv2d(padded, filters, added, window[2:4], 0, window[8:10], window[10])
    return activate(y, ACTIVATIONS[activation]).to(x.dtype).contiguous()


def _fake(x, weight, bias, activation, window):
    check_images(x, weight, window[11])
    return x.new_empty(*x.shape[:2], *patches.output_size(x.shape[2:], window))


define(
    "depthwise_conv(Tensor x, Tensor weight, Tensor? bias, int activation, int[] window) -> Tensor",
    reference,
    _fake,
)


@register_flop_formula(torch.ops.fxsparse.depthwise_conv)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(weight_shape) * x_shape[0] * prod(patches.output_size(x_shape[2:], args[-1]))


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight.contiguous()}


def _reference(x, bias, weight, activation: str = "none", **arguments: Any) -> Tensor:
    images, added = as_images(x, len(arguments["kernel_size"]))
    y = reference(images, weight, bias, ACTIVATIONS.index(activation), window(**arguments))
    return as_given(y, added)


def _refuses(problem: Problem) -> list[str]:
    reasons = cpu.refuses(problem)
    if problem.training:
        reasons.append("it has no gradient")
    if problem.shape[1] != 1 or dict(problem.arguments).get("groups", 1) != problem.shape[0]:
        reasons.append("it has one filter for each channel")
    return reasons


def _cost(problem: Problem) -> Cost:
    numel = prod(problem.shape)
    return Cost(2 * problem.batch * numel, numel * problem.dtype.itemsize)


DEPTHWISE = register(
    Kernel("cpu-depthwise", "conv2d", "depthwise", _pack, depthwise_conv, _reference, _refuses, _cost)
)
