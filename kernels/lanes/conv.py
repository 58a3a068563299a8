"""Convolutions with a sparse weight in blocks of columns, on images in lanes; for inference."""

from collections.abc import Sequence
from dataclasses import fields
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import column_blocks
from fxsparse.kernel import register_glue
from fxsparse.kernels.csr import conv_inference, patches
from fxsparse.kernels.csr.conv import window
from fxsparse.kernels.lanes.layout import LANES, reference_from_lanes, reference_to_lanes
from fxsparse.kernels.library import activation_code, define, refuse_gradient

PANEL_LINES = 900
"""Pixels of 16 lanes that a block of the weight should read at most: 56 KiB, somewhat more than L1 has.

With half of it, which fits, ResNets of 90 and 95 % zeros took 1.05 to 1.1 times as long: rows have few entries in a
block then, and their sums go back and forth between L1 and L2 for each."""
_RUN = 7


@register_glue
def csr_conv_lanes(
    x: Tensor,
    bias: Tensor | None,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    grid: int,
    over_residual: bool = False,
    **arguments: Any,
) -> Tensor:
    """`csr_conv_infer` of the images that x has in lanes (`lanes.layout`), with the result in lanes, too; fp32.

    With a `grid` above 1 the output has to be as large as the input divided by the stride, in whole parts.  With
    `over_residual` the result is written into `residual`, which is returned: no memory is fetched only to be written
    over.  Autograd does not see that it changed.

    Raises:
        UnsupportedError: an input, or a residual to write over, that requires a gradient.
        RuntimeError: an x of other channels or dtype than the weight's, an output that does not fit the grid, or a
            residual to write over that has not the output's shape, in order, or shares memory with x.
    """
    refuse_gradient(x, bias, values, residual)
    code = activation_code(activation)
    if over_residual:
        if residual is None:
            raise RuntimeError("fxsparse: expected a residual to write over, got None")
        torch.ops.fxsparse.csr_conv_lanes_over.default(
            x, values, start, columns, bias, residual, code, window(**arguments), grid
        )
        return residual
    return torch.ops.fxsparse.csr_conv_lanes.default(
        x, values, start, columns, bias, residual, code, window(**arguments), grid
    )


@register_glue
def conv_lanes(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    grid: int,
    **arguments: Any,
) -> Tensor:
    """`csr_conv_lanes` with a dense weight [out, in / groups, height, width], as of a stem or of single channels."""
    refuse_gradient(x, bias, weight, residual)
    code = activation_code(activation)
    return torch.ops.fxsparse.conv_lanes.default(x, weight, bias, residual, code, window(**arguments), grid)


@register_glue
def pack_lanes(matrix: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Values, start and columns for `csr_conv_lanes` of the weight as a matrix [out, in / groups * kernel]."""
    blocks = column_blocks.from_dense(matrix, width(window(**arguments)))
    return {field.name: getattr(blocks, field.name) for field in fields(blocks)}


def width(window: Sequence[int]) -> int:
    """Columns of a block of the weight whose panel has PANEL_LINES, for tiles of about 2 x 7 output pixels."""
    (kernel_height, kernel_width), (step, stride), (gap, dilation) = window[:2], window[2:4], window[8:10]
    rows = 1 + kernel_height if step == gap == 1 and kernel_height > 1 else kernel_height
    phases = len({tap * dilation % stride for tap in range(kernel_width)})
    lines = rows * phases * (_RUN + (kernel_width - 1) * dilation // stride)
    return max(1, PANEL_LINES // lines) * kernel_height * kernel_width


def reference(
    x: Tensor,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    window: Sequence[int],
    grid: int,
) -> Tensor:
    """The op in plain PyTorch."""
    images = reference_from_lanes(x, grid)
    added = None if residual is None else reference_from_lanes(residual, grid)
    _check(images, window, grid)
    y = conv_inference.reference(images, values, start, columns, bias, added, activation, window)
    return reference_to_lanes(y, grid)


def reference_over(
    x: Tensor,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    activation: int,
    window: Sequence[int],
    grid: int,
) -> None:
    """`csr_conv_lanes` into its residual, in plain PyTorch."""
    _check_over(residual, _fake(x, values, start, columns, bias, None, activation, window, grid))
    residual.copy_(reference(x, values, start, columns, bias, residual, activation, window, grid))


def _fake_over(x, values, start, columns, bias, residual, activation, window, grid) -> None:
    _check_over(residual, _fake(x, values, start, columns, bias, None, activation, window, grid))


def _check_over(residual: Tensor, y: Tensor) -> None:
    if residual.shape != y.shape or residual.dtype != torch.float32 or not residual.is_contiguous():
        raise RuntimeError(
            f"fxsparse: expected a contiguous residual {list(y.shape)} in float32 to write over, got "
            f"{list(residual.shape)} in {residual.dtype}"
        )


def reference_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    window: Sequence[int],
    grid: int,
) -> Tensor:
    """`conv_lanes` in plain PyTorch."""
    blocks = column_blocks.from_dense(weight.flatten(1))
    return reference(x, blocks.values, blocks.start, blocks.columns, bias, residual, activation, window, grid)


def _check(images: Tensor, window: Sequence[int], grid: int) -> None:
    out = patches.output_size(images.shape[2:], window)
    fits = [
        size == n * stride and n % grid == 0
        for size, n, stride in zip(images.shape[2:], out, window[2:4], strict=True)
    ]
    if grid > 1 and not all(fits):
        raise RuntimeError(
            f"fxsparse: expected an output of {list(images.shape[2:])} by the stride, in {grid} parts, got {out}"
        )


def _fake(x, values, start, columns, bias, residual, activation, window, grid):
    return _output(x, start.shape[1] - 1, window, grid)


def _fake_dense(x, weight, bias, residual, activation, window, grid):
    return _output(x, weight.shape[0], window, grid)


def _output(x: Tensor, rows: int, window: Sequence[int], grid: int) -> Tensor:
    size = patches.output_size([grid * x.shape[2], grid * x.shape[3]], window)
    return x.new_empty(len(x), rows, *(n // grid for n in size), LANES)


define(
    "csr_conv_lanes(Tensor x, Tensor values, Tensor start, Tensor columns, Tensor? bias, Tensor? residual, "
    "int activation, int[] window, int grid) -> Tensor",
    reference,
    _fake,
)


define(
    "csr_conv_lanes_over(Tensor x, Tensor values, Tensor start, Tensor columns, Tensor? bias, Tensor(a!) residual, "
    "int activation, int[] window, int grid) -> ()",
    reference_over,
    _fake_over,
)


define(
    "conv_lanes(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, int[] window, int grid) "
    "-> Tensor",
    reference_dense,
    _fake_dense,
)


@register_flop_formula(
    [
        torch.ops.fxsparse.csr_conv_lanes,
        torch.ops.fxsparse.csr_conv_lanes_over,
        torch.ops.fxsparse.conv_lanes,
    ]
)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    grid = args[-1]
    size = patches.output_size([grid * x_shape[2], grid * x_shape[3]], args[-2])
    return 2 * prod(weight_shape) * x_shape[0] * LANES * prod(size) // grid**2
