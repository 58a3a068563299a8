"""Gradients of the product with a CSR weight on the GPU: of the input by columns, of the weight where it is stored."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxsparse.kernels.csr._triton import Rows, tiled
from fxsparse.kernels.csr.tilings import UNROLL, launched
from fxsparse.kernels.gpu import DTYPES
from fxsparse.kernels.gpu.panels_triton import panels_of

_WARPS = 8


@triton.jit
def sample(
    grad, x, crow, cols, sums, slots, outputs, inputs, tiles, halvings,
    ENTRIES: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """``grad^T x`` at the entries of a CSR index, 0 in slots without one; program (slots).

    Panels grad [tiles, outputs, TOKENS] and x [tiles, inputs, TOKENS].  A slot's row is found by halving the rows, so
    that programs have as much to do however uneven the rows are.
    """
    slot = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    used = slot < tl.load(crow + outputs)
    row = tl.zeros((ENTRIES,), dtype=tl.int32)  # crow[row] <= slot < crow[end]
    end = row + outputs
    for _ in range(halvings):
        middle = row + (end - row) // 2
        above = tl.load(crow + middle, mask=used, other=0) <= slot
        row, end = tl.where(above, middle, row), tl.where(above, end, middle)
    column = tl.load(cols + slot, mask=used, other=0)
    lane = tl.arange(0, TOKENS)[None, :]
    grads = grad + row.to(tl.int64)[:, None] * TOKENS + lane
    read = x + column.to(tl.int64)[:, None] * TOKENS + lane
    count = tl.where(used, tiles, 0)
    total = tl.zeros((ENTRIES, TOKENS), dtype=tl.float32)
    for first in range(0, tiles, UNROLL):
        for part in tl.static_range(UNROLL):
            tile = tl.cast(first + part, tl.int64)
            there = (tile < count)[:, None]
            left = tl.load(grads + tile * outputs * TOKENS, mask=there, other=0.0).to(tl.float32)
            total += left * tl.load(read + tile * inputs * TOKENS, mask=there, other=0.0).to(tl.float32)
    tl.store(sums + slot, tl.sum(total, 1).to(sums.dtype.element_ty), mask=slot < slots)


def sampled(grad: Tensor, x: Tensor, crow: Tensor, cols: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of `sample` in `dtype`, [slots], for panels of one width."""
    tiles, outputs, width = grad.shape
    sums, entries = grad.new_empty(len(cols), dtype=dtype), _entries(width, grad.dtype)
    if len(cols):
        sample[(triton.cdiv(len(cols), entries),)](
            grad, x, crow, cols.contiguous(), sums, len(cols), outputs, x.shape[1], tiles, outputs.bit_length(),
            entries, width, UNROLL, num_warps=_WARPS,
        )  # fmt: skip
    return sums


def forward(grad: Tensor, x: Tensor, crow: Tensor, cols: Tensor) -> Tensor:
    """``fxsparse::csr_sample``."""
    width = Rows(cols, cols, crow).tilings(len(grad), grad.dtype)[0].tokens
    return sampled(panels_of(grad, width), panels_of(x, width), crow, cols, torch.float32)


def backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    ccol: Tensor,
    rows_t: Tensor,
    perm: Tensor,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``fxsparse::csr_backward``, without atomics: every entry of a gradient is one sum in one order."""
    tokens = grad.shape[:-1].numel()
    flat = grad.reshape(tokens, grad.shape[-1])
    grad_x, grad_values, grad_bias = x.new_empty(0), values.new_empty(0), grad.new_empty(0)
    # Unused slots of `perm` are -1: they stand after the last entry, and nobody reads what they get.
    columns = Rows(values[perm] if need_x else values, rows_t, ccol)
    tiling = columns.tiling(flat)
    grads = panels_of(flat, tiling.tokens) if need_x or need_values else flat
    if need_x:
        grad_x = tiled(grads, tokens, columns, tiling) if x.numel() else x.new_empty(tokens, x.shape[-1])
    if need_values:
        inputs = panels_of(x.reshape(tokens, x.shape[-1]), tiling.tokens)
        grad_values = sampled(grads, inputs, crow, cols, values.dtype)
    if need_bias:
        grad_bias = flat.sum(0)
    return grad_x.reshape(x.shape) if need_x else grad_x, grad_values, grad_bias


def _entries(width: int, dtype: torch.dtype) -> int:
    """Slots of a program whose threads each load 16 bytes of tokens, or one value where there are fewer."""
    return 32 * _WARPS // max(1, width * dtype.itemsize // 16)


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """As those of ``_triton``."""
    for dtype in DTYPES:
        for width in sorted({tiling.tokens for tiling in launched(dtype)}):
            given = [
                dtype,
                dtype,
                torch.int32,
                torch.int32,
                dtype,
                4096,
                4096,
                4096,
                1 if width == 1 else 8,
                13,
            ]
            given += [_entries(width, dtype), width, UNROLL]
            arguments = dict(zip(sample.arg_names, given, strict=True))
            yield f"sample {dtype}, {width} tokens", sample, arguments, {"num_warps": _WARPS}
