"""Products with a weight by its nonzeros on the GPU: a program gathers, for some rows, the inputs of a tile of tokens.

Inputs come as panels (`panels_of`), in which the tokens of a tile lie side by side: what is gathered for one nonzero is
one piece of memory, and a weight is read once for all of them.  Lanes go along a row, whose columns ascend, so that
what a warp gathers lies close together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxsparse.kernels.csr.tilings import UNROLL, Tiling, launched, tilings
from fxsparse.kernels.gpu import DTYPES, multiprocessors, panels_triton, tuning
from fxsparse.kernels.gpu.epilogue_triton import activate
from fxsparse.kernels.gpu.panels_triton import panels_of
from fxsparse.kernels.library import check_added, check_input

_FINISHED = 1024
"""Outputs that a program adds the parts of."""


@triton.jit
def multiply(
    panels, values, crow, cols, active_rows, empty_rows, scales, bias, residual, y,
    inputs, outputs, active, fan_in, tokens, bands, splits,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, TOKENS: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_CROW: tl.constexpr, HAS_EMPTY: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Sums [splits, tokens, outputs] for panels [tiles, inputs, TOKENS]; program (split, band of rows, tile of tokens).

    Rows start at `crow`, or every one of the first `active` has `fan_in` entries and the others none; with `HAS_EMPTY`
    the two kinds stand at `active_rows` and `empty_rows` of the result.
    """
    tiles = tl.cdiv(tokens, TOKENS)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    split = tl.program_id(0) // tiles // bands
    token = tile * TOKENS + tl.arange(0, TOKENS)
    panel = panels + tile * inputs * TOKENS + tl.arange(0, TOKENS)[None, None, :]
    entry = tl.arange(0, ENTRIES)[None, :]
    for group in range(tl.program_id(0) // tiles % bands, tl.cdiv(outputs, ROWS), bands):
        row = group * ROWS + tl.arange(0, ROWS)
        known = row < outputs
        if HAS_CROW:
            begin = tl.load(crow + row, mask=known, other=0)
            length = tl.load(crow + row + 1, mask=known, other=0) - begin
        else:
            begin = row.to(tl.int64) * fan_in
            length = tl.where(row < active, fan_in, 0)
        share = tl.cdiv(length, splits)
        begin += split * share
        length = tl.minimum(share, length - split * share)
        total = tl.zeros((ROWS, ENTRIES, TOKENS), dtype=tl.float32)
        for step in range(0, tl.max(length), ENTRIES * UNROLL):
            for part in tl.static_range(UNROLL):
                e = step + part * ENTRIES + entry
                real = e < length[:, None]
                at = begin[:, None] + e  # read once: what stays in the L1 are the inputs
                column = tl.load(cols + at, mask=real, other=0, eviction_policy="evict_first").to(tl.int64)
                weight = tl.load(values + at, mask=real, other=0, eviction_policy="evict_first")
                gathered = tl.load(panel + column[:, :, None] * TOKENS, mask=real[:, :, None], other=0.0)
                total += weight.to(tl.float32)[:, :, None] * gathered.to(tl.float32)
        result = tl.sum(total, 1)  # [ROWS, TOKENS]
        if HAS_SCALES:
            result *= tl.load(scales + row, mask=known, other=0.0).to(tl.float32)[:, None]
        place = row
        if HAS_EMPTY:
            filled = row < active
            place = tl.load(active_rows + row, mask=filled, other=0)
            place += tl.load(empty_rows + row - active, mask=known & (row >= active), other=0)
        if HAS_BIAS:
            result += tl.load(bias + place, mask=known, other=0.0).to(tl.float32)[:, None]
        at = token[None, :] * outputs + place[:, None]
        there = known[:, None] & (token < tokens)[None, :]
        if HAS_RESIDUAL:
            result += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
        part = y + split.to(tl.int64) * tokens * outputs
        tl.store(part + at, activate(result, ACTIVATION).to(y.dtype.element_ty), mask=there)


@triton.jit
def finish(
    parts, bias, residual, y, outputs, count, splits,
    COUNT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Outputs [count] from the parts [splits, count] of its sums, added in order."""
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    there = at < count
    total = tl.zeros((COUNT,), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * count + at, mask=there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % outputs, mask=there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, activate(total, ACTIVATION).to(y.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class Rows:
    """A weight by its rows: those of a CSR index, or as many entries in every row that is not empty."""

    values: Tensor
    """[capacity], or [active, fan-in]."""
    columns: Tensor
    crow: Tensor | None = None
    active_rows: Tensor | None = None
    empty_rows: Tensor | None = None
    scales: Tensor | None = None

    @property
    def outputs(self) -> int:
        """How many rows there are, the empty ones among them."""
        if self.crow is not None:
            return len(self.crow) - 1
        return len(self.values) + (0 if self.empty_rows is None else len(self.empty_rows))

    @property
    def active(self) -> int:
        """Rows that may have entries."""
        return self.outputs if self.crow is not None else len(self.values)

    @property
    def fan_in(self) -> int:
        """Entries of an active row, where that is one number."""
        return 0 if self.crow is not None else self.values.shape[1]

    def tilings(self, tokens: int, dtype: torch.dtype) -> tuple[Tiling, ...]:
        """The forms to try, the first unmeasured."""
        mean = self.values.numel() / max(1, self.active)
        return tilings(tokens, self.outputs, mean, dtype, multiprocessors(self.values.device))

    def tiling(self, x: Tensor) -> Tiling:
        """The fastest form for x [tokens, in], as far as it is known."""
        sizes = (*x.shape, self.outputs, self.values.numel(), x.dtype, self.values.dtype, self.columns.dtype)
        return tuning.fastest(
            __name__,
            (*sizes, self.crow is None),
            lambda: self.tilings(len(x), x.dtype),
            lambda form: tiled(panels_of(x, form.tokens), len(x), self, form),
            x.device,
        )


def linear(
    x: Tensor, weight: Rows, bias: Tensor | None, activation: int, residual: Tensor | None = None
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` [..., out] for x [..., in].

    Raises:
        RuntimeError: a bias or residual of another shape, or a residual of another dtype, than the result's.
    """
    shape = (*x.shape[:-1], weight.outputs)
    check_added(x.new_empty(shape, device="meta"), weight.outputs, bias, residual)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if 0 in shape:
        return x.new_empty(shape)
    tiling = weight.tiling(flat)
    y = tiled(panels_of(flat, tiling.tokens), len(flat), weight, tiling, bias, activation, residual)
    return y.view(shape)


def tiled(
    panels: Tensor,
    tokens: int,
    weight: Rows,
    tiling: Tiling,
    bias: Tensor | None = None,
    activation: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear` for inputs as panels of ``tiling.tokens``: [tokens, out]."""
    y = panels.new_empty(tokens, weight.outputs)
    bias, added = (None if t is None else t.contiguous() for t in (bias, residual))
    whole = tiling.splits == 1
    parts = y if whole else panels.new_empty(tiling.splits, *y.shape, dtype=torch.float32)
    multiply[(len(panels) * tiling.bands * tiling.splits,)](
        panels, weight.values.contiguous(), weight.crow, weight.columns.contiguous(),
        weight.active_rows, weight.empty_rows, weight.scales,
        bias if whole else None, added if whole else None, parts,
        panels.shape[1], weight.outputs, weight.active, weight.fan_in, tokens, tiling.bands, tiling.splits,
        tiling.rows, tiling.entries, tiling.tokens, UNROLL, activation if whole else 0,
        weight.crow is not None, weight.empty_rows is not None, weight.scales is not None,
        whole and bias is not None, whole and added is not None,
        **tiling.options,
    )  # fmt: skip
    if not whole:
        finish[(triton.cdiv(y.numel(), _FINISHED),)](
            parts, bias, added, y, weight.outputs, y.numel(), tiling.splits,
            _FINISHED, activation, bias is not None, added is not None,
        )  # fmt: skip
    return y


def forward(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """``fxsparse::csr_forward``."""
    check_input(x, values, in_features, scales)
    return linear(x, Rows(values, cols, crow, scales=scales), bias, activation, residual)


def variants() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    """(name, kernel, values of its arguments, options) of every form that is launched, without a device.

    A tensor is given as its dtype.
    """
    forms = [(dtype, tiling) for dtype in DTYPES for tiling in launched(dtype)]
    for (dtype, tiling), has_crow in product(forms, (True, False)):
        given = [dtype, dtype, torch.int32, torch.int16, torch.int32, torch.int32, None, dtype, dtype, dtype]
        given += [4096, 4096, 4096, 400, 1 if tiling.tokens == 1 else 256, 8, 1]
        given += [
            tiling.rows,
            tiling.entries,
            tiling.tokens,
            UNROLL,
            2,
            has_crow,
            not has_crow,
            False,
            True,
            True,
        ]
        held = f"{tiling.tokens} tokens, {tiling.rows} rows, {tiling.warps} warps"
        name = f"{'csr' if has_crow else 'condensed'} {dtype}, {held}"
        yield name, multiply, dict(zip(multiply.arg_names, given, strict=True)), tiling.options
    for dtype in DTYPES:
        given = [torch.float32, dtype, dtype, dtype, 512, 512, 4, _FINISHED, 2, True, True]
        yield f"sum of parts {dtype}", finish, dict(zip(finish.arg_names, given, strict=True)), {}
    yield from panels_triton.variants(DTYPES, (2, 16, 32))
