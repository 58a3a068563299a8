"""Sparse convolution on the GPU: a program sums one output channel over a tile of pixels, and gathers as it goes.

No patches are made.  Neighbouring programs make other channels of the same pixels, so that what one gathers lies
in a cache for the next.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxsparse.kernels.csr import conv_inference, patches
from fxsparse.kernels.gpu import DTYPES, tuning
from fxsparse.kernels.gpu.epilogue_triton import activate
from fxsparse.kernels.library import check_added

OPTIONS = {"num_warps": 4}
"""Of every launch: 4 or 8 sums of a thread, as 16 take more registers than leave room for enough programs."""


class Tile(NamedTuple):
    """What a program holds at a time."""

    pixels: int
    entries: int
    """Gathered together for each of them."""


PIXELS = (32, 64, 128, 256)
TILES = tuple(Tile(pixels, sums // pixels) for sums, pixels in product((1024, 512), PIXELS))
"""All that are launched."""


@triton.jit
def convolve(
    x, values, start, columns, bias, residual, y,
    pixels, rows, blocks, block_width, channels, height, width, out_height, out_width, group_rows, group_channels,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE_HEIGHT: tl.constexpr, STRIDE_WIDTH: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, DILATION_HEIGHT: tl.constexpr, DILATION_WIDTH: tl.constexpr,
    IS_PADDED: tl.constexpr, TILE: tl.constexpr, ENTRIES: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Outputs [samples, rows, out_height, out_width] of x [samples, channels, height, width] and a weight in
    `formats.column_blocks` of `block_width` columns; the program's row runs faster than its tile of pixels.
    """
    row, tile = tl.program_id(0) % rows, tl.program_id(0) // rows
    pixel = tile * TILE + tl.arange(0, TILE)
    inside = pixel < pixels
    area = out_height * out_width
    sample, place = (pixel // area).to(tl.int64), pixel % area
    upper, left = place // out_width * STRIDE_HEIGHT - TOP, place % out_width * STRIDE_WIDTH - LEFT
    first = (sample * channels + row // group_rows * group_channels) * height * width
    corner = x + first + upper * width + left
    entry = tl.arange(0, ENTRIES)
    total = tl.zeros((ENTRIES, TILE), dtype=tl.float32)
    for block in range(blocks):
        begin = tl.load(start + block * (rows + 1) + row)
        end = tl.load(start + block * (rows + 1) + row + 1)
        for e in range(begin, end, ENTRIES):
            there = e + entry < end
            column = tl.load(columns + e + entry, mask=there, other=0).to(tl.int32) + block * block_width
            value = tl.load(values + e + entry, mask=there, other=0.0).to(tl.float32)
            channel, window = (
                column // (KERNEL_HEIGHT * KERNEL_WIDTH),
                column % (KERNEL_HEIGHT * KERNEL_WIDTH),
            )
            down = window // KERNEL_WIDTH * DILATION_HEIGHT
            right = window % KERNEL_WIDTH * DILATION_WIDTH
            valid = there[:, None] & inside[None, :]
            if IS_PADDED:
                line, at = upper[None, :] + down[:, None], left[None, :] + right[:, None]
                valid = valid & (line >= 0) & (line < height) & (at >= 0) & (at < width)
            offset = (channel.to(tl.int64) * height + down) * width + right
            inputs = tl.load(corner[None, :] + offset[:, None], mask=valid, other=0.0)
            total += value[:, None] * inputs.to(tl.float32)
    result = tl.sum(total, 0)
    if HAS_BIAS:
        result += tl.load(bias + row).to(tl.float32)
    to = (sample * rows + row) * area + place
    if HAS_RESIDUAL:
        result += tl.load(residual + to, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + to, activate(result, ACTIVATION).to(y.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    window: Sequence[int],
) -> Tensor:
    """``fxsparse::csr_conv_inference`` by `convolve`; dtypes that it lacks go through the dense weight."""
    if x.dtype not in DTYPES or values.dtype not in DTYPES:
        return conv_inference.reference(x, values, start, columns, bias, residual, activation, window)
    conv_inference.check(x, values, bias, window)
    height, width = patches.output_size(x.shape[2:], window)
    rows, fan_in = start.shape[1] - 1, x.shape[1] // window[10] * window[0] * window[1]
    y = x.new_empty(len(x), rows, height, width)
    check_added(y, rows, bias, residual)
    if y.numel() == 0:
        return y
    pixels, added = len(x) * height * width, None if residual is None else residual.contiguous()
    x = x.contiguous()

    def run(tile: Tile) -> None:
        convolve[(rows * triton.cdiv(pixels, tile.pixels),)](
            x, values, start, columns, bias, added, y,
            pixels, rows, len(start), max(1, -(-fan_in // len(start))), *x.shape[1:], height, width,
            rows // window[10], x.shape[1] // window[10],
            *window[:6], *window[8:10], any(window[4:8]), tile.pixels, tile.entries, activation,
            bias is not None, added is not None, **OPTIONS,
        )  # fmt: skip

    sizes = (*x.shape, rows, values.numel(), *window, x.dtype, values.dtype)
    run(tuning.fastest(__name__, sizes, lambda: tiles_for(pixels), run, x.device))
    return y


def tiles_for(pixels: int) -> tuple[Tile, ...]:
    """The tiles to try for so many pixels of all samples; the first, as wide as they are, is to be taken unmeasured."""
    fitting = [tile for tile in TILES if tile.pixels < 2 * pixels] or [TILES[0]]
    first = max(fitting, key=lambda tile: (tile.pixels, tile.entries))
    return first, *(tile for tile in fitting if tile != first)


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """(name, kernel, values of its arguments, options) of the forms that are launched, without a device: each tile and
    dtype for a few windows.

    A tensor is given as its dtype.
    """
    windows = {"1x1": (1, 1, 1, 1, 0, 0, 1, 1, False), "3x3": (3, 3, 1, 1, 1, 1, 1, 1, True)}
    windows["7x7, stride 2"] = (7, 7, 2, 2, 3, 3, 1, 1, True)
    for dtype, tile, (name, numbers) in product(DTYPES, TILES, windows.items()):
        given: list[Any] = [dtype, torch.float32, torch.int32, torch.int16, dtype, dtype, dtype, *[7] * 11]
        given += [*numbers, *tile, 2, True, True]
        arguments = dict(zip(convolve.arg_names, given, strict=True))
        yield f"conv {name} {dtype}, {tile.pixels} pixels x {tile.entries}", convolve, arguments, OPTIONS
