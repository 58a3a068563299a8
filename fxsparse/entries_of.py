"""Packed weights as their nonzeros and back: what a file holds, so that no layout of a kernel is ever read from one."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fxsparse import kernel
from fxsparse.errors import CheckpointError, PatternError
from fxsparse.formats import column_blocks, csr
from fxsparse.kernel import Entries, Kernel
from fxsparse.packed import PackedWeight

_AT_ONCE = 1 << 22
"""Numbers of the identity matrix that are multiplied by a weight at once."""
_SHORT = 1 << 15
_BUFFERS_OF_BLOCKS = {"values", "start", "columns"}


@dataclass(frozen=True)
class Stored:
    """A weight by its nonzeros, or dense where its kernel keeps all entries."""

    values: Tensor
    """[nnz] by row and then by column; the dense weight where `counts` is None."""
    counts: Tensor | None
    """int32 [rows]: entries of each row."""
    columns: Tensor | None
    """[nnz], int16 where the row is short enough."""
    scales: Tensor | None
    """[rows], of values that are narrower than the weight."""

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


def stored(packed: PackedWeight) -> Stored:
    """The nonzeros of a packed weight, on the CPU, checked to give the very same buffers again.

    Raises:
        CheckpointError: a kernel whose layout they do not determine.
    """
    entry, buffers = kernel.registered()[packed.kernel], dict(packed.named_buffers())
    found = _read(entry, packed, buffers)
    if found is not None:
        again = repacked(packed.kernel, packed.shape, found, packed.lanes)
        if again.keys() == buffers.keys() and all(_same(again[name], buffers[name]) for name in buffers):
            return found
    raise CheckpointError(
        f"save: a weight [{', '.join(map(str, packed.shape))}] packed for {packed.kernel} cannot be told by its "
        "nonzeros: expected one as compile returned it, not converted since. Convert after loading, or pickle the "
        "module."
    )


def repacked(
    name: str, shape: tuple[int, ...], weight: Stored, lanes: Mapping[str, Any] | None
) -> Mapping[str, Tensor]:
    """The buffers of the kernel of this name."""
    entry = kernel.registered()[name]
    if weight.counts is None:
        return kernel.packed(entry, weight.values)
    if lanes is not None:
        return kernel.glue("pack_lanes")(dense(shape, weight).flatten(1), **lanes)
    if weight.scales is not None:
        return kernel.glue("pack_rounded")(entry, _packable(entry, shape, weight), weight.scales)
    return kernel.packed(entry, _packable(entry, shape, weight))


def values_of(shape: tuple[int, ...], weight: Stored) -> Tensor:
    """The dense weight that kernels compute with."""
    matrix = dense(shape, weight)
    if weight.scales is None:
        return matrix
    return matrix.to(weight.scales.dtype) * weight.scales[:, None]


def dense(shape: tuple[int, ...], weight: Stored) -> Tensor:
    """The weight with its zeros; values that have scales are not multiplied by them."""
    if weight.counts is None:
        return weight.values
    flat = weight.values.new_zeros(prod(shape))
    flat[csr.positions_in(_indices(weight), (shape[0], prod(shape[1:])))] = weight.values
    return flat.view(shape)


def check(shape: tuple[int, ...], weight: Stored) -> None:
    """ValueError unless the parts fit each other and the shape."""
    rows = shape[0]
    if weight.scales is not None and (weight.scales.shape != (rows,) or weight.counts is None):
        raise ValueError(f"expected {rows} scales, got {list(weight.scales.shape)}")
    if weight.counts is None or weight.columns is None:
        if tuple(weight.values.shape) != shape or weight.columns is not None:
            raise ValueError(f"expected a dense weight {list(shape)}, got {list(weight.values.shape)}")
        return
    counts, columns = weight.counts, weight.columns
    whole = all(t.dtype in (torch.int16, torch.int32) and t.dim() == 1 for t in (counts, columns))
    if not whole or len(counts) != rows or bool((counts < 0).any()):
        raise ValueError(f"expected the number of entries in each of {rows} rows, and their columns")
    if weight.values.shape != columns.shape or int(counts.sum()) != len(columns):
        raise ValueError(f"expected {int(counts.sum())} values and columns, got {len(columns)}")
    try:
        csr.positions_in(_indices(weight), (rows, prod(shape[1:])))
    except PatternError as error:
        raise ValueError(str(error)) from error


def _packable(entry: Kernel, shape: tuple[int, ...], weight: Stored) -> Tensor | Entries:
    if entry.pack_entries is None:
        return dense(shape, weight)
    return Entries(weight.values, _indices(weight), shape)


def _indices(weight: Stored) -> Tensor:
    assert weight.counts is not None
    assert weight.columns is not None
    rows = torch.repeat_interleave(torch.arange(len(weight.counts)), weight.counts.long())
    return torch.stack([rows.int(), weight.columns.int()])


def _read(entry: Kernel, packed: PackedWeight, buffers: Mapping[str, Tensor]) -> Stored | None:
    if entry.op == "linear":
        return _by_product(entry, packed.shape, buffers)
    if entry.format == "depthwise":
        return Stored(buffers["weight"].cpu(), None, None, None)
    if buffers.keys() != _BUFFERS_OF_BLOCKS:
        return None
    held = column_blocks.ColumnBlocks(**buffers)
    return _of_matrix(column_blocks.to_dense(held, prod(packed.shape[1:])).cpu())


def _of_matrix(matrix: Tensor) -> Stored:
    rows, columns = matrix.nonzero().unbind(1)
    return _of_entries(matrix[rows, columns], rows, columns, (matrix.shape[0], matrix.shape[1]), None)


def _of_entries(
    values: Tensor, rows: Tensor, columns: Tensor, shape: tuple[int, int], scales: Tensor | None
) -> Stored:
    counts = torch.bincount(rows, minlength=shape[0]).int()
    narrow = torch.int16 if shape[1] < _SHORT else torch.int32
    return Stored(values, counts, columns.to(narrow), scales)


def _by_product(entry: Kernel, shape: tuple[int, ...], buffers: Mapping[str, Tensor]) -> Stored:
    """The products of the kernel with unit vectors, each of which is one entry, exactly."""
    buffers, scales = dict(buffers), None
    if entry.values is not None:
        scales = _by_row(buffers["scales"], buffers.get("active_rows"), shape[0])
        buffers["scales"] = torch.ones_like(buffers["scales"])
    typed = buffers["scales"] if scales is not None else buffers["values"]
    found = []
    with torch.no_grad(), torch.autocast(typed.device.type, enabled=False):
        for start in range(0, shape[1], step := max(1, _AT_ONCE // max(1, shape[1]))):
            units = torch.zeros(min(step, shape[1] - start), shape[1], dtype=typed.dtype, device=typed.device)
            units.diagonal(start).fill_(1)
            product = entry.run(units, None, *buffers.values(), in_features=shape[1]).cpu()
            columns, rows = product.nonzero().unbind(1)
            found.append((rows, columns + start, product[columns, rows]))
    rows, columns, values = (torch.cat(part) for part in zip(*found, strict=True))
    order = torch.argsort(rows * shape[1] + columns)
    kept = values[order] if entry.values is None else values[order].to(entry.values)
    return _of_entries(kept, rows[order], columns[order], (shape[0], shape[1]), scales)


def _by_row(scales: Tensor, active_rows: Tensor | None, rows: int) -> Tensor:
    """The scales in the order of the rows; rows without entries have 1."""
    if active_rows is None:
        return scales.cpu()
    every = scales.new_ones(rows)
    every[active_rows.long()] = scales
    return every.cpu()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other.cpu())
