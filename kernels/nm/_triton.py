"""Products with N:M and strided 1:M weights on the GPU: memory holds N of every M inputs, registers the zeros.

Many tokens multiply dense tiles on tensor cores; a few gather their inputs, which the places tell apart within a group.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxsparse.formats import nm
from fxsparse.kernels.gpu import DTYPES, INTERPRETED, multiprocessors, precision, tuning
from fxsparse.kernels.gpu.epilogue_triton import activate
from fxsparse.kernels.library import check_added, check_input
from fxsparse.kernels.nm import launch
from fxsparse.kernels.nm.linear import inputs_of


@triton.jit
def multiply(
    x, values, positions, bias, residual, y,
    tokens, rows, features, x_stride,
    N: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr, STRIDED: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, INPUTS: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Outputs [tokens, rows] of x [tokens, features]; program (tile of rows, tile of tokens), INPUTS of them at a time.

    PADDED is N or the next power of two.  STRIDED: the M inputs of a group lie features / M apart, so that those of
    neighbouring groups are read side by side; a tile has their first ones, then their second ones, and so on.  The sum
    is that of the transposed result: the weight's tile may then come from registers.
    """
    groups: tl.constexpr = INPUTS // M
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    slot, column = tl.arange(0, groups * PADDED), tl.arange(0, INPUTS)
    stored = features // M * N
    if PADDED == N:
        entry, is_slot = slot, slot >= 0
    else:
        entry, is_slot = slot // PADDED * N + slot % PADDED, slot % PADDED < N
    at = row.to(tl.int64)[:, None] * stored + entry[None, :]
    apart = features // M
    offset = column // groups * apart + column % groups if STRIDED else column
    x_rows = x + token.to(tl.int64)[:, None] * x_stride + offset[None, :]
    places = tl.arange(0, M)
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for first in range(0, features, INPUTS):
        done = first // M * N
        is_stored = (row < rows)[:, None] & (is_slot & (entry + done < stored))[None, :]
        value = tl.load(values + at + done, mask=is_stored, other=0.0)
        place = tl.load(positions + at + done, mask=is_stored, other=M)
        if STRIDED:
            is_input, ahead = column % groups + first // M < apart, first // M
            weights = tl.where(place[:, None, :] == places[None, :, None], value[:, None, :], 0.0)
        else:
            is_input, ahead = column + first < features, first
            place = tl.reshape(place, (ROWS, groups, PADDED, 1))
            value = tl.reshape(value, (ROWS, groups, PADDED, 1))
            weights = tl.sum(tl.where(place == places[None, None, None, :], value, 0.0), 2)
        inputs = tl.load(x_rows + ahead, mask=(token < tokens)[:, None] & is_input[None, :], other=0.0)
        weights = tl.reshape(weights, (ROWS, INPUTS)).to(x.dtype.element_ty)
        if WIDEN:
            inputs, weights = inputs.to(tl.float32), weights.to(tl.float32)
        total = tl.dot(weights, tl.trans(inputs), total, input_precision=PRECISION)
    finish(tl.trans(total), token, row, tokens, rows, bias, residual, y, ACTIVATION, HAS_BIAS, HAS_RESIDUAL)


@triton.jit
def gather(
    x, values, positions, bias, residual, y,
    tokens, rows, stored, x_stride,
    N: tl.constexpr, M: tl.constexpr, STRIDED: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Outputs [tokens, rows] for at most TOKENS tokens, with `stored` values in each row; program (tile of rows,)."""
    row, slot, token = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS), tl.arange(0, TOKENS)
    at = row.to(tl.int64)[:, None] * stored + slot[None, :]
    x_rows = x + token.to(tl.int64)[:, None, None] * x_stride
    is_token = (token < tokens)[:, None, None]
    total = tl.zeros((TOKENS, ROWS, SLOTS), dtype=tl.float32)
    for first in range(0, stored, SLOTS):
        is_stored = (row < rows)[:, None] & (slot + first < stored)[None, :]
        value = tl.load(values + at + first, mask=is_stored, other=0.0).to(tl.float32)
        place = tl.load(positions + at + first, mask=is_stored, other=0).to(tl.int32)
        entry = (slot + first)[None, :]
        column = place * stored + entry if STRIDED else entry // N * M + place
        inputs = tl.load(x_rows + column[None, :, :], mask=is_token & is_stored[None, :, :], other=0.0)
        total += value[None, :, :] * inputs.to(tl.float32)
    finish(tl.sum(total, 2), token, row, tokens, rows, bias, residual, y, ACTIVATION, HAS_BIAS, HAS_RESIDUAL)


@triton.jit
def finish(
    total, token, row, tokens, rows, bias, residual, y,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Write ``activation(total + bias + residual)`` of a tile [token, row]."""
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    at = token.to(tl.int64)[:, None] * rows + row[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    group: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
) -> Tensor:
    """``fxsparse::nm_forward`` by `gather` for a few tokens, else by `multiply`."""
    features = inputs_of(values, group)
    check_input(x, values, features)
    y = x.new_empty(*x.shape[:-1], values.shape[0])
    check_added(y, values.shape[0], bias, residual)
    if y.numel() == 0:
        return y
    flat = x.reshape(-1, features).contiguous()
    tensors = flat, values, positions, bias, None if residual is None else residual.contiguous(), y
    flags = activation, bias is not None, residual is not None
    run = _gather if len(flat) <= launch.DECODED else _multiply
    run(tensors, (len(flat), len(values)), nm.sizes_of(group), flags)
    return y


def _multiply(tensors: tuple, sizes: tuple[int, int], group: tuple[int, int, bool], flags: tuple) -> None:
    x, (tokens, rows), (n, m, strided) = tensors[0], sizes, group

    def run(how: launch.Launch) -> None:
        multiply[triton.cdiv(rows, how.rows), triton.cdiv(tokens, how.tokens)](
            *tensors, *sizes, x.shape[1], x.shape[1],
            n, triton.next_power_of_2(n), m, strided,
            how.rows, how.tokens, how.inputs, *flags, precision(), INTERPRETED,
            **how.options,
        )  # fmt: skip

    launches = partial(launch.of_tiles, tokens, n, m, x.element_size(), strided)
    run(tuning.fastest(__name__, (*x.shape, rows, *group, x.dtype, precision()), launches, run, x.device))


def _gather(tensors: tuple, sizes: tuple[int, int], group: tuple[int, int, bool], flags: tuple) -> None:
    x, values = tensors[:2]

    def run(how: launch.Launch) -> None:
        gather[(triton.cdiv(sizes[1], how.rows),)](
            *tensors, *sizes, values.shape[1], x.shape[1],
            *group, how.rows, how.tokens, how.inputs, *flags,
            **how.options,
        )  # fmt: skip

    launches = partial(launch.of_gather, *sizes, multiprocessors(x.device))
    run(
        tuning.fastest(
            __name__, ("gather", *x.shape, *values.shape, *group, x.dtype), launches, run, x.device
        )
    )


_TRAINED = tuple((n, m, False) for n, m in ((1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (3, 8), (2, 16), (4, 16)))
_TRAINED += tuple((1, m, True) for m in (4, 8, 16))


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """(name, kernel, values of its arguments, options) of every form that is launched, without a device.

    A tensor is given as its dtype.  Every (N, M) makes a form of its own; these are those that are trained for.
    """
    for dtype, (n, m, strided) in product(DTYPES, _TRAINED):
        name = f"strided {n}:{m}" if strided else f"{n}:{m}"
        tensors, flags = [dtype, dtype, torch.uint8, dtype, dtype, dtype], [2, True, True]
        exact = "tf32" if dtype == torch.float32 else "ieee"
        for tokens in (16, 64, 128):
            how = launch.of_tiles(tokens, n, m, dtype.itemsize, strided)[0]
            sizes = [
                tokens,
                4096,
                4096,
                4096,
                n,
                triton.next_power_of_2(n),
                m,
                strided,
                how.rows,
                how.tokens,
                how.inputs,
            ]
            arguments = dict(zip(multiply.arg_names, [*tensors, *sizes, *flags, exact, False], strict=True))
            yield f"{name} {dtype}, {tokens} tokens", multiply, arguments, how.options
        for tokens in (1, 8):
            how = launch.of_gather(tokens, 4096, 132)[0]
            sizes = [tokens, 4096, 4096 // m * n, 4096, n, m, strided, how.rows, how.tokens, how.inputs]
            arguments = dict(zip(gather.arg_names, [*tensors, *sizes, *flags], strict=True))
            yield f"{name} {dtype}, {tokens} gathered", gather, arguments, how.options
