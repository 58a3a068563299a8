"""Convolutions for inference with a sparse weight in blocks of columns, and their kernel entry.

The weight is the matrix [out, in / groups * kernel] with the flat positions of the dense weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import column_blocks
from fxsparse.kernel import Cost, Entries, Kernel, Problem, register
from fxsparse.kernels import cpu, gpu
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
    on_gpu,
    refuse_gradient,
)

WIDEST_ON_GPU = 2**15
"""Columns of a block at most: there rows do not wait for each other, so that blocks only keep the numbers short."""


def csr_conv_infer(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """``activation(F.conv2d(x, W, bias, ...) + residual)`` with W in ``formats.column_blocks``; no gradient.

    `arguments` are kernel_size, in_channels, stride, padding, dilation and groups as of ``F.conv2d``, or
    ``F.conv1d`` where kernel_size is one number.  x [samples, in_channels, *size], or one sample without the first
    dimension, is of one floating dtype with bias [out] and residual (of the output's shape); values are fp32 or of
    that dtype.  Sums are in fp32 (fp64 for fp64).  The result is contiguous.

    Raises:
        UnsupportedError: an input that requires a gradient.
        RuntimeError: an x of other channels or another dtype than the weight's.
        ValueError: an x of too few or too many dimensions, or smaller with its padding than the kernel.
    """
    refuse_gradient(x, bias, values, residual)
    x, values, bias = autocast(x, values, bias)
    numbers = window(**arguments)
    check_size(x, arguments["kernel_size"], numbers)
    images, added = as_images(x, len(arguments["kernel_size"]))
    if residual is not None:
        residual, _ = as_images(residual.to(x.dtype), len(arguments["kernel_size"]))
    known = gpu.DTYPES if x.is_cuda else COMPILED
    run = reference if x.dtype not in known else torch.ops.fxsparse.csr_conv_inference.default
    code = activation_code(activation)
    return as_given(run(images, values, start, columns, bias, residual, code, numbers), added)


def reference(
    x: Tensor,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    window: Sequence[int],
) -> Tensor:
    """The op in plain PyTorch: the dense convolution of the unpacked weight, on images and in at least fp32."""
    check(x, values, bias, window)
    groups, (top, left, bottom, right) = window[10], window[4:8]
    wide = torch.promote_types(x.dtype, torch.float32)
    channels = x.shape[1] // groups
    matrix = column_blocks.to_dense(
        column_blocks.ColumnBlocks(values.to(wide), start, columns), channels * prod(window[:2])
    )
    weight = matrix.view(-1, channels, *window[:2])
    padded = F.pad(x.to(wide), (left, right, top, bottom))
    y = F.conv2d(padded, weight, None, window[2:4], 0, window[8:10], groups)
    y = y if bias is None else y + bias.to(wide)[:, None, None]
    y = y if residual is None else y + residual.to(wide)
    return activate(y, ACTIVATIONS[activation]).to(x.dtype).contiguous()


def check(x: Tensor, values: Tensor, bias: Tensor | None, window: Sequence[int]) -> None:
    """`check_images` for values that are fp32 in weights of half precision, too: there the bias tells its dtype."""
    half = values.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    check_images(x, bias if bias is not None else x if half else values, window[11])


def _fake(x, values, start, columns, bias, residual, activation, window):
    check(x, values, bias, window)
    return x.new_empty(x.shape[0], start.shape[1] - 1, *patches.output_size(x.shape[2:], window))


define(
    "csr_conv_inference(Tensor x, Tensor values, Tensor start, Tensor columns, Tensor? bias, Tensor? residual, "
    "int activation, int[] window) -> Tensor",
    reference,
    _fake,
)


def _on_gpu(*args):
    from fxsparse.kernels.csr import _conv_triton

    return _conv_triton.forward(*args)


on_gpu("csr_conv_inference", _on_gpu)


@register_flop_formula(torch.ops.fxsparse.csr_conv_inference)
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * values_shape[0] * x_shape[0] * prod(patches.output_size(x_shape[2:], args[-1]))


def _pack(weight: Tensor, widest: int = column_blocks.WIDEST) -> Mapping[str, Tensor]:
    return _buffers(column_blocks.from_dense(weight.flatten(1), widest))


def _pack_entries(entries: Entries, widest: int = column_blocks.WIDEST) -> Mapping[str, Tensor]:
    rows, columns = entries.indices
    shape = (entries.shape[0], prod(entries.shape[1:]))
    return _buffers(column_blocks.from_entries(entries.values, rows, columns, shape, widest))


def _buffers(blocks: column_blocks.ColumnBlocks) -> Mapping[str, Tensor]:
    return {field.name: getattr(blocks, field.name) for field in fields(blocks)}


def _reference(
    x, bias, values, start, columns, activation: str = "none", residual=None, **arguments: Any
) -> Tensor:
    images, added = as_images(x, len(arguments["kernel_size"]))
    if residual is not None:
        residual, _ = as_images(residual, len(arguments["kernel_size"]))
    code = ACTIVATIONS.index(activation)
    return as_given(
        reference(images, values, start, columns, bias, residual, code, window(**arguments)), added
    )


def _refuses(problem: Problem) -> list[str]:
    reasons = cpu.refuses(problem)
    if problem.training:
        reasons.append("it has no gradient: cpu-csr-conv-train has")
    return reasons + _refuses_depthwise(problem)


def _refuses_on_gpu(problem: Problem) -> list[str]:
    reasons = gpu.refuses(problem)
    if problem.training:
        reasons.append("it has no gradient: on a GPU convolutions train dense under a mask")
    return reasons + _refuses_depthwise(problem)


def _refuses_depthwise(problem: Problem) -> list[str]:
    is_depthwise = problem.shape[1] == 1 and dict(problem.arguments).get("groups", 1) > 1
    return ["the convolution is depthwise: the dense one is the faster"] if is_depthwise else []


def _cost(problem: Problem) -> Cost:
    rows = -(-prod(problem.shape[1:]) // column_blocks.WIDEST) * (problem.shape[0] + 1)
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * (4 + 2) + 4 * rows)


CSR_CONV = register(
    Kernel("cpu-csr-conv", "conv2d", "csr", _pack, csr_conv_infer, _reference, _refuses, _cost, _pack_entries)
)
CSR_CONV_ON_GPU = register(
    Kernel(
        "cuda-csr-conv",
        "conv2d",
        "csr",
        partial(_pack, widest=WIDEST_ON_GPU),
        csr_conv_infer,
        _reference,
        _refuses_on_gpu,
        _cost,
        partial(_pack_entries, widest=WIDEST_ON_GPU),
    )
)
