"""The exact selection on the GPU, by the digits of integers that are ordered as the scores are.

A row that fits a program's registers is searched there, bit by bit.  Of a longer one every pass counts a digit of
eight bits (a radix select); integer counts add up in any order, so that the result is the same each time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HELD = 8192
"""Columns of a row that one program holds; half as many in fp64."""
TILE = 4096
"""Scores that a program reads in a pass over longer rows."""


@triton.jit
def inverse(bits, BITS: tl.constexpr):
    """Every bit turned over; Triton 3.6's interpreter has no ``~`` of unsigned integers."""
    top = tl.full((), 1, bits.dtype) << (BITS - 1)
    return bits ^ (top | (top - 1))


@triton.jit
def ordered(scores, inside, BITS: tl.constexpr):
    """Unsigned integers in the order of the scores, 0.0 and -0.0 the same; 0, below all of them, where not `inside`."""
    wide = scores if BITS == 64 else scores.to(tl.float32)
    bits = wide.to(tl.uint64 if BITS == 64 else tl.uint32, bitcast=True)
    bits = tl.where((bits << 1) == 0, bits ^ bits, bits)
    top = tl.full((), 1, bits.dtype) << (BITS - 1)
    return tl.where(inside, tl.where(bits >= top, inverse(bits, BITS), bits | top), bits ^ bits)


@triton.jit
def is_above_least(keys, BITS: tl.constexpr):
    """Whether the score of such an integer is above -inf."""
    least = tl.full((), 0xFFFFFFFFFFFFF if BITS == 64 else 0x7FFFFF, keys.dtype)
    return keys > least


@triton.jit
def note_nan(keys, inside, nan, BITS: tl.constexpr):
    """1 into `nan` where there is one."""
    least = tl.full((), 0xFFFFFFFFFFFFF if BITS == 64 else 0x7FFFFF, keys.dtype)
    bad = inside & ((keys < least) | (keys > inverse(least, BITS)))
    tl.store(nan, 1, mask=tl.max(bad.to(tl.int32), 0) > 0)


@triton.jit
def how_many(n, columns):
    """What is asked for of a row, int32 from 0 to its columns."""
    return tl.minimum(tl.maximum(tl.load(n), 0), columns).to(tl.int32)


@triton.jit
def select_in_row(scores, n, mask, nan, columns, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of one row, all of which the program holds: its n-th largest bit by bit, then the ties from the left."""
    column = tl.arange(0, BLOCK)
    inside = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    keys = ordered(tl.load(scores + at, mask=inside, other=0.0), inside, BITS)
    note_nan(keys, inside, nan, BITS)
    wanted = how_many(n, columns)
    threshold, bit = tl.full((), 0, keys.dtype), tl.full((), 1, keys.dtype) << (BITS - 1)
    for _ in range(BITS):
        enough = tl.sum((keys >= (threshold | bit)).to(tl.int32), 0) >= wanted
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    above, ties = keys > threshold, (keys == threshold).to(tl.int32)
    missing = wanted - tl.sum(above.to(tl.int32), 0)
    chosen = above | ((ties > 0) & (tl.cumsum(ties, 0) <= missing))
    tl.store(mask + at, (chosen & is_above_least(keys, BITS)).to(tl.uint8), mask=inside)


@triton.jit
def threshold_of(counts, n, row, rows, columns, PASSES: tl.constexpr, BITS: tl.constexpr):
    """(the first digits of the n-th largest score, how many of those that share them are asked for, and are there)."""
    digits = tl.arange(0, 256)
    prefix = tl.full((), 0, tl.uint64 if BITS == 64 else tl.uint32)
    missing, ties = how_many(n, columns), tl.full((), 0, tl.int32)
    for done in tl.static_range(PASSES):
        count = tl.load(counts + (row + done * rows) * 256 + digits)
        at_least = tl.sum(count, 0) - tl.cumsum(count, 0) + count
        digit = tl.sum((at_least >= missing).to(tl.int32), 0) - 1
        ties = tl.sum(tl.where(digits == digit, count, 0), 0)
        missing -= tl.sum(tl.where(digits > digit, count, 0), 0)
        prefix = prefix | (digit.to(prefix.dtype) << (BITS - 8 * (done + 1)))
    return prefix, missing, ties


@triton.jit
def tile_of_row(scores, columns, tiles, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """(row, first score's place, places, which of them are inside, keys) of the tile that this program reads."""
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row * columns + column
    return row, at, inside, ordered(tl.load(scores + at, mask=inside, other=0.0), inside, BITS)


@triton.jit
def count_digits(
    scores, n, counts, nan, rows, columns, tiles, PASS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """How often each digit number PASS comes among the scores whose digits before it are the n-th largest's."""
    row, _, inside, keys = tile_of_row(scores, columns, tiles, BITS, BLOCK)
    prefix, _, _ = threshold_of(counts, n, row, rows, columns, PASS, BITS)
    shift: tl.constexpr = BITS - 8 * (PASS + 1)
    if PASS == 0:
        note_nan(keys, inside, nan, BITS)
        counted = inside
    else:
        counted = inside & (((keys ^ prefix) >> (shift + 8)) == 0)
    digit = tl.where(counted, ((keys >> shift) & 255).to(tl.int32), 0)
    digits = tl.arange(0, 256)
    found = tl.histogram(digit, 256)
    found -= tl.where(digits == 0, tl.sum((~counted).to(tl.int32), 0), 0)
    tl.atomic_add(counts + (row + PASS * rows) * 256 + digits, found, mask=found > 0, sem="relaxed")


@triton.jit
def count_ties(
    scores, n, counts, tied, rows, columns, tiles, PASSES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many scores of each tile equal the n-th largest; not counted, 0, where all of them are chosen."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    threshold, missing, ties = threshold_of(counts, n, row, rows, columns, PASSES, BITS)
    if missing < ties:
        _, _, inside, keys = tile_of_row(scores, columns, tiles, BITS, BLOCK)
        tl.store(tied + tl.program_id(0), tl.sum((inside & (keys == threshold)).to(tl.int32), 0))
    else:
        tl.store(tied + tl.program_id(0), 0)


@triton.jit
def mark(
    scores, n, counts, before, mask, rows, columns, tiles,
    PASSES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mask: what is above the n-th largest, and of what equals it the first so many."""
    row, at, inside, keys = tile_of_row(scores, columns, tiles, BITS, BLOCK)
    threshold, missing, _ = threshold_of(counts, n, row, rows, columns, PASSES, BITS)
    equal = (inside & (keys == threshold)).to(tl.int32)
    place = tl.load(before + tl.program_id(0)) + tl.cumsum(equal, 0)
    chosen = (keys > threshold) | ((equal > 0) & (place <= missing))
    tl.store(mask + at, (chosen & is_above_least(keys, BITS)).to(tl.uint8), mask=inside)


def top_of_rows(scores: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """``fxsparse::top_of_rows`` by these kernels; other dtypes, and rows beyond int32, go through a stable sort."""
    rows, columns = scores.shape
    if scores.dtype not in DTYPES or columns > 2**31 - TILE:
        from fxsparse.kernels.top_mask import select

        return select.top_of_rows(scores, n)
    scores, nan = scores.contiguous(), torch.zeros(1, dtype=torch.int32, device=scores.device)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if scores.numel() == 0:
        return mask, nan
    bits = bits_of(scores.dtype)
    if columns <= held(bits):
        block = max(16, triton.next_power_of_2(columns))
        select_in_row[(rows,)](scores, n, mask.view(torch.uint8), nan, columns, bits, block, **options(block))
    else:
        _by_digits(scores, n, mask.view(torch.uint8), nan, bits)
    return mask, nan


def _by_digits(scores: Tensor, n: Tensor, mask: Tensor, nan: Tensor, bits: int) -> None:
    rows, columns = scores.shape
    passes, tiles = bits // 8, triton.cdiv(columns, TILE)
    sizes, grid, launch = (rows, columns, tiles), (rows * tiles,), options(TILE)
    counts = torch.zeros(passes, rows, 256, dtype=torch.int32, device=scores.device)
    tied = torch.empty(rows, tiles, dtype=torch.int32, device=scores.device)
    for digit in range(passes):
        count_digits[grid](scores, n, counts, nan, *sizes, digit, bits, TILE, **launch)
    count_ties[grid](scores, n, counts, tied, *sizes, passes, bits, TILE, **launch)
    before = tied.cumsum(1, dtype=torch.int32) - tied
    mark[grid](scores, n, counts, before, mask, *sizes, passes, bits, TILE, **launch)


def bits_of(dtype: torch.dtype) -> int:
    """Of the integers that stand for scores: those of the dtype, at least 32."""
    return 64 if dtype == torch.float64 else 32


def held(bits: int) -> int:
    """Columns that one program can hold."""
    return HELD * 32 // bits


def options(block: int) -> dict[str, int]:
    """How programs of so many scores are launched: a thread has at most 16."""
    return {"num_warps": min(16, max(1, block // 512))}


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """(name, kernel, values of its arguments, options) of every form that is launched, without a device.

    A tensor is given as its dtype.
    """
    counter, number, flags = torch.int32, torch.int64, torch.uint8
    for dtype in DTYPES:
        bits = bits_of(dtype)
        for block in (2**power for power in range(4, held(bits).bit_length())):
            given = [dtype, number, flags, counter, block - 1, bits, block]
            yield _variant(f"top of rows of {block}, {dtype}", select_in_row, given, block)
        sizes, last = [3, TILE + 1, 3], [bits // 8, bits, TILE]
        for digit in range(bits // 8):
            given = [dtype, number, counter, counter, *sizes, digit, bits, TILE]
            yield _variant(f"digit {digit} of {dtype}", count_digits, given, TILE)
        given = [dtype, number, counter, counter, *sizes, *last]
        yield _variant(f"ties of {dtype}", count_ties, given, TILE)
        given = [dtype, number, counter, counter, flags, *sizes, *last]
        yield _variant(f"mask of {dtype}", mark, given, TILE)


def _variant(
    name: str, kernel: Any, given: list[Any], block: int
) -> tuple[str, Any, dict[str, Any], dict[str, Any]]:
    return name, kernel, dict(zip(kernel.arg_names, given, strict=True)), options(block)
