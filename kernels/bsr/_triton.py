"""Products with blocks on the GPU: outputs and input gradients by tiles of tokens, weight gradients block by block.

Blocks go through tensor cores whole: 64 x 64 of them are the tiles of a dense product, and skipping is free.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxsparse.formats.bsr import TENSOR_BLOCKS
from fxsparse.kernels.bsr import launch, reference
from fxsparse.kernels.gpu import DTYPES, INTERPRETED, multiprocessors, precision, tuning
from fxsparse.kernels.gpu.epilogue_triton import activate
from fxsparse.kernels.library import check_added, check_input

SIZES = {torch.Size(block) for block in TENSOR_BLOCKS}


@triton.jit
def multiply(
    x, values, pointers, others, places, order, bias, residual, y,
    tokens, lines, x_stride, y_stride,
    INNER: tl.constexpr, OUTER: tl.constexpr, INNER_STEP: tl.constexpr, OUTER_STEP: tl.constexpr,
    TOKENS: tl.constexpr, BAND: tl.constexpr, ACTIVATION: tl.constexpr, HAS_PLACES: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Outputs [tokens, lines * OUTER] of x [tokens, ...] and blocks [INNER, OUTER], whatever their strides in `values`.

    A line is a block row in the product, a block column in the gradient of its input; `others` names the blocks of x
    that meet the line's.  Programs: bands of tiles, in each the lines in order, for each line the tiles.
    """
    program, tiles = tl.program_id(0), tl.cdiv(tokens, TOKENS)
    first = program // (lines * BAND) * BAND
    in_band = tl.minimum(tiles - first, BAND)
    within = program % (lines * BAND)
    line = within // in_band
    if HAS_ORDER:
        line = tl.load(order + line)
    token = (first + within % in_band) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None]
    inner, outer = tl.arange(0, INNER), tl.arange(0, OUTER)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride + inner[None, :]
    block = values + inner[:, None] * INNER_STEP + outer[None, :] * OUTER_STEP
    total = tl.zeros((TOKENS, OUTER), dtype=tl.float32)
    begin, end = tl.load(pointers + line), tl.load(pointers + line + 1)
    # What the next step reads is looked up a step ahead, or no load could run ahead of the products.
    other = tl.load(others + begin, mask=begin < end, other=0)
    place = tl.load(places + begin, mask=begin < end, other=0) if HAS_PLACES else begin
    for e in range(begin, end):
        inputs = tl.load(x_rows + other * INNER, mask=inside, other=0.0)
        weights = tl.load(block + place.to(tl.int64) * (INNER * OUTER))
        other = tl.load(others + e + 1, mask=e + 1 < end, other=0)
        place = tl.load(places + e + 1, mask=e + 1 < end, other=0) if HAS_PLACES else e + 1
        if WIDEN:
            inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(inputs, weights, total, input_precision=PRECISION)
    out = line * OUTER + outer
    if HAS_BIAS:
        total += tl.load(bias + out).to(tl.float32)[None, :]
    at = token.to(tl.int64)[:, None] * y_stride + out[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=inside)


@triton.jit
def sample(
    grad, x, columns, rows_t, perm, made,
    tokens, blocks, part, grad_stride, x_stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``x^T grad`` of the stored blocks, [parts of `part` tokens, blocks, WIDTH, HEIGHT]; program (block, part).

    Blocks go by column, so that those which run together share inputs.
    """
    e, begin = tl.program_id(0), tl.program_id(1) * part
    place = tl.load(perm + e)
    row, column = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    x_rows = x + tl.load(columns + place) * WIDTH + column[:, None]
    grad_rows = grad + tl.load(rows_t + e) * HEIGHT + row[None, :]
    total = tl.zeros((WIDTH, HEIGHT), dtype=tl.float32)
    end = tl.minimum(begin + part, tokens)
    for first in range(begin, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        inside, at = token < end, token.to(tl.int64)
        inputs = tl.load(x_rows + at[None, :] * x_stride, mask=inside[None, :], other=0.0)
        upstream = tl.load(grad_rows + at[:, None] * grad_stride, mask=inside[:, None], other=0.0)
        if WIDEN:
            inputs, upstream = inputs.to(tl.float32), upstream.to(tl.float32)
        total = tl.dot(inputs, upstream, total, input_precision=PRECISION)
    block = made + (tl.program_id(1).to(tl.int64) * blocks + place) * (HEIGHT * WIDTH)
    tl.store(block + column[:, None] * HEIGHT + row[None, :], total.to(made.dtype.element_ty))


def forward(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    columns: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """``fxsparse::bsr_forward`` by `multiply`; blocks that tensor cores do not take go through the dense weight."""
    if values.dim() == 4 or values.shape[1:] not in SIZES:
        return reference.linear(x, values, crow, columns, dense, bias, activation, residual)
    check_input(x, values, dense.shape[2])
    y = x.new_empty(*x.shape[:-1], dense.shape[1])
    check_added(y, dense.shape[1], bias, residual)
    added = None if residual is None else residual.contiguous()
    _multiply(_rows(x), values, crow, columns, None, order, bias, added, y, activation)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    columns: Tensor,
    dense: Tensor,
    ccol: Tensor,
    rows_t: Tensor,
    perm: Tensor,
    order_t: Tensor,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fxsparse::bsr_backward`` by `multiply` and `sample`; blocks that tensor cores do not take go densely."""
    if values.shape[1:] not in SIZES:
        index = (crow, columns, dense, ccol, rows_t, perm, order_t)
        return reference.linear_backward(grad, x, values, *index, need_x, need_values, need_bias)
    upstream = _rows(grad)
    grad_x, grad_values, grad_bias = x.new_empty(0), values.new_empty(0), grad.new_empty(0)
    if need_x:
        grad_x = x.new_empty(x.shape)
        _multiply(upstream, values, ccol, rows_t, perm, order_t, None, None, grad_x, 0)
    if need_values:
        grad_values = _sample(upstream, _rows(x), values, columns, rows_t, perm)
    if need_bias:
        grad_bias = upstream.sum(0)
    return grad_x, grad_values, grad_bias


def _multiply(
    x: Tensor,
    values: Tensor,
    pointers: Tensor,
    others: Tensor,
    places: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    activation: int,
) -> None:
    """Write y [..., lines * outer]; with `places` the blocks are read transposed."""
    if y.numel() == 0:
        return
    _, width, height = values.shape
    shape = (width, height, height, 1) if places is None else (height, width, 1, height)
    on_tensor_cores = x.dtype != torch.float32 or precision() == "tf32"
    lines = len(pointers) - 1

    def run(how: launch.Launch) -> None:
        multiply[(lines * triton.cdiv(len(x), how.tokens),)](
            x, values, pointers, others, places, order, bias, residual, y,
            len(x), lines, x.shape[1], y.shape[-1],
            *shape, how.tokens, launch.BAND, activation, places is not None,
            order is not None, bias is not None, residual is not None, precision(), INTERPRETED,
            **how.options,
        )  # fmt: skip

    def launches() -> Sequence[launch.Launch]:
        return launch.of_product(len(x), height * width, x.element_size(), on_tensor_cores)

    sizes = (*x.shape, *values.shape, lines, x.dtype, places is None, precision())
    run(tuning.fastest(__name__, sizes, launches, run, x.device))


def _sample(grad: Tensor, x: Tensor, values: Tensor, columns: Tensor, rows_t: Tensor, perm: Tensor) -> Tensor:
    blocks, width, height = values.shape
    if blocks == 0 or len(x) == 0:
        return torch.zeros_like(values)

    def run(how: launch.Launch) -> Tensor:
        parts = launch.splits_of_sample(blocks, len(x), how.tokens, multiprocessors(x.device))
        part = ceil(len(x) / parts / how.tokens) * how.tokens
        made = values.new_empty(parts, *values.shape, dtype=values.dtype if parts == 1 else torch.float32)
        sample[(blocks, parts)](
            grad, x, columns, rows_t, perm, made,
            len(x), blocks, part, grad.shape[1], x.shape[1],
            height, width, how.tokens, precision(), INTERPRETED,
            **how.options,
        )  # fmt: skip
        return made[0] if parts == 1 else made.sum(0).to(values.dtype)

    sizes = ("sample", *x.shape, *values.shape, grad.shape[1], x.dtype, precision())
    launches = partial(launch.of_sample, height, width, x.element_size())
    return run(tuning.fastest(__name__, sizes, launches, run, x.device))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """(name, kernel, values of its arguments, options) of every form that is launched, without a device.

    A tensor is given as its dtype.
    """
    index, exact = [torch.int32] * 4, ((torch.float32, "tf32"), *((dtype, "ieee") for dtype in DTYPES))
    for (dtype, rounded), (height, width) in product(exact, TENSOR_BLOCKS):
        is_plain = dtype == torch.float32 and rounded == "ieee"
        size = f"{height}x{width} {dtype}{' unrounded' if is_plain else ''}"
        for tile in (16, 32, 64, 128):
            how = launch.of_product(tile, height * width, dtype.itemsize, not is_plain)[0]
            if how.tokens != tile:
                continue
            given = [dtype, dtype, *index, dtype, dtype, dtype, tile, 4, width, height]
            flags = [tile, launch.BAND, 2, False, True, True, True, rounded, False]
            shape = [width, height, height, 1]
            arguments = dict(zip(multiply.arg_names, given + shape + flags, strict=True))
            yield f"bsr {size}, {tile} tokens", multiply, arguments, how.options
            shape = [height, width, 1, height]
            flags = [tile, launch.BAND, 0, True, True, False, False, rounded, False]
            arguments = dict(zip(multiply.arg_names, given + shape + flags, strict=True))
            yield f"bsr input gradient {size}, {tile} tokens", multiply, arguments, how.options
        how = launch.of_sample(height, width, dtype.itemsize)[0]
        given = [dtype, dtype, *index[:3], torch.float32, 64, 8, 64, height, width]
        given += [height, width, how.tokens, rounded, False]
        arguments = dict(zip(sample.arg_names, given, strict=True))
        yield f"bsr weight gradient {size}", sample, arguments, how.options
