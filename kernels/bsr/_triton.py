"""The product with blocks on the GPU: a program makes the outputs of one block row for a tile of tokens.

Blocks go through tensor cores whole: 64 x 64 of them are the tiles of a dense product, and skipping is free.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxsparse.formats.bsr import TENSOR_BLOCKS
from fxsparse.kernels.bsr.linear import reference
from fxsparse.kernels.gpu import DTYPES, INTERPRETED, precision
from fxsparse.kernels.gpu.epilogue_triton import activate
from fxsparse.kernels.library import check_input

_LARGE = 1 << 15
SIZES = {torch.Size(block) for block in TENSOR_BLOCKS}


@triton.jit
def multiply(
    x, values, crow, columns, bias, residual, y,
    tokens, x_stride, y_stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Outputs [tokens, out] for x [tokens, in], values [blocks, WIDTH, HEIGHT]; program (block row, tile of tokens)."""
    block_row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    row, column = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    begin = tl.load(crow + block_row)
    block = values + begin.to(tl.int64) * (HEIGHT * WIDTH) + column[:, None] * HEIGHT + row[None, :]
    total = tl.zeros((TOKENS, HEIGHT), dtype=tl.float32)
    for e in range(begin, tl.load(crow + block_row + 1)):
        inputs = tl.load(x_rows + tl.load(columns + e) * WIDTH, mask=inside, other=0.0)
        weights = tl.load(block)
        if WIDEN:
            inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(inputs, weights, total, input_precision=PRECISION)
        block += HEIGHT * WIDTH
    out = block_row * HEIGHT + row
    if HAS_BIAS:
        total += tl.load(bias + out).to(tl.float32)[None, :]
    at = token.to(tl.int64)[:, None] * y_stride + out[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    columns: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
) -> Tensor:
    """``fxsparse::bsr_forward`` by `multiply`; blocks that tensor cores do not take go through the dense weight."""
    if values.dim() == 4 or values.shape[1:] not in SIZES:
        return reference(x, values, crow, columns, dense, bias, activation, residual)
    check_input(x, values, dense.shape[2])
    _, width, height = values.shape
    rows, y = x.reshape(-1, x.shape[-1]).contiguous(), x.new_empty(*x.shape[:-1], dense.shape[1])
    if y.numel() == 0:
        return y
    block_bytes = height * width * x.element_size()
    tile = tile_of(len(rows), block_bytes)
    added = None if residual is None else residual.contiguous()
    multiply[(len(crow) - 1, triton.cdiv(len(rows), tile))](
        rows, values, crow, columns, bias, added, y, len(rows), rows.shape[1], dense.shape[1],
        height, width, tile, activation, bias is not None, added is not None, precision(), INTERPRETED,
        **options(tile, block_bytes),
    )  # fmt: skip
    return y


def tile_of(tokens: int, block_bytes: int) -> int:
    """Tokens of a tile: as many as there are, as a power of two that tensor cores take; fewer beside large blocks."""
    return min(64 if block_bytes >= _LARGE else 128, max(16, triton.next_power_of_2(tokens)))


def options(tile: int, block_bytes: int) -> dict[str, int]:
    """How tiles of so many tokens are launched: what is loaded ahead has to fit a multiprocessor's memory."""
    return {
        "num_warps": 8 if tile * block_bytes >= 128 * 4096 else 4,
        "num_stages": 2 if block_bytes > _LARGE else 3,
    }


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """(name, kernel, values of its arguments, options) of every form that is launched, without a device.

    A tensor is given as its dtype.
    """
    for dtype, (height, width) in product(DTYPES, TENSOR_BLOCKS):
        size = height * width * dtype.itemsize
        for tile in sorted({tile_of(tokens, size) for tokens in (16, 32, 64, 128)}):
            given = [dtype, dtype, torch.int32, torch.int32, dtype, dtype, dtype, tile, width, height]
            given += [height, width, tile, 2, True, True, "tf32" if dtype == torch.float32 else "ieee", False]
            arguments = dict(zip(multiply.arg_names, given, strict=True))
            yield f"bsr {height}x{width} {dtype}, {tile} tokens", multiply, arguments, options(tile, size)
