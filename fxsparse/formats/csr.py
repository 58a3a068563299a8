"""CSR with its transposed index: the training layout of unstructured weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import PatternError

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class CsrIndex:
    """Where the nonzeros of a weight [out, in] are; all int32, and all changed in place by `move_`.

    `indices` alone decides the rest.  Order of entries: by row, then by column, as in `values` [capacity].  Where
    there are fewer entries than the capacity, the row pointers end with their count, and -1 fills the other slots of
    `indices`, `rows_t` and `perm`.
    """

    indices: Tensor
    """[2, capacity]: row and column of every entry; the one tensor to save."""
    crow: Tensor
    """[out + 1]: where each row starts in `values`."""
    ccol: Tensor
    """[in + 1]: where each column starts in the column-major order."""
    rows_t: Tensor
    """[capacity]: row of each entry, in column-major order; like `perm` [0] in an index that only goes by rows."""
    perm: Tensor
    """[capacity]: position in `values` of each entry, in column-major order."""

    @property
    def cols(self) -> Tensor:
        """[capacity]: column of every entry, a view of `indices`."""
        return self.indices[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.crow.numel() - 1, self.ccol.numel() - 1

    @property
    def capacity(self) -> int:
        """How many entries there is room for."""
        return self.indices.shape[1]

    @property
    def nnz(self) -> int:
        """How many entries there are."""
        return int(self.crow[-1])


def from_flat(
    flat: Tensor, shape: tuple[int, int], capacity: int | None = None, *, transposed: bool = True
) -> CsrIndex:
    """The index of the entries at flat positions `flat` (int64 [nnz], ascending) of a weight of `shape`.

    There is room for `capacity` entries, by default for these and no more.  Only a `transposed` index has `rows_t` and
    `perm`.
    """
    slots = flat.numel() if capacity is None else capacity
    index = _around(torch.empty(2, slots, dtype=torch.int32, device=flat.device), shape, transposed)
    move_(index, flat)
    return index


def from_mask(mask: Tensor) -> CsrIndex:
    """The index of the true entries of `mask` [out, in]."""
    return from_flat(mask.reshape(-1).nonzero().squeeze(1), (mask.shape[0], mask.shape[1]))


def from_indices(indices: Tensor, shape: tuple[int, int]) -> CsrIndex:
    """The index around an existing `indices` tensor (kept, not copied), as a checkpoint has it."""
    index = _around(indices, shape)
    move_(index, positions_in(indices, shape))
    return index


def positions_in(indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Flat positions, int64 [nnz] ascending, of the entries of `indices` [2, capacity] without an index around it.

    PatternError where an entry is repeated, out of order or outside the weight, or something but -1 follows the last.
    """
    nnz = int((indices[0] >= 0).count_nonzero())
    rows, cols = indices[:, :nnz]
    inside = bool(((rows >= 0) & (rows < shape[0]) & (cols >= 0) & (cols < shape[1])).all())
    if not inside or not bool((indices[:, nnz:] == -1).all()):
        raise PatternError(
            f"expected rows and columns inside the {shape[0]} x {shape[1]} weight, and -1 in every slot "
            "after the last entry"
        )
    flat = rows.long().mul_(shape[1]).add_(cols)
    if not bool((flat.diff() > 0).all()):
        raise PatternError(f"entries inside the {shape[0]} x {shape[1]} weight must be strictly ascending")
    return flat


def move_(index: CsrIndex, flat: Tensor) -> None:
    """Let the entries be, in place, those at the flat positions `flat` (int64 [nnz], strictly ascending).

    PatternError where they are more than the capacity, or a position is repeated, out of order or outside the weight.
    """
    if flat.numel() > index.capacity:
        raise PatternError(
            f"the layout has room for {index.capacity} entries, got {flat.numel()}: build a new one"
        )
    tensors = (index.indices, index.crow, index.ccol, index.rows_t, index.perm)
    moved = torch.ops.fxsparse.csr_move_(flat.contiguous(), *tensors)  # kernels/csr/topology.py
    # The C++ op does not count as a change for autograd: a backward through what was there before has to fail.
    torch.autograd.graph.increment_version(tensors)
    if not moved:
        rows, columns = index.shape
        raise PatternError(f"positions must be strictly ascending and inside the {rows} x {columns} weight")


def pointers(rows: Tensor, count: int) -> Tensor:
    """Where each of `count` rows starts, int32 [count + 1], in entries whose `rows` are ascending."""
    starts = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=count).cumsum(0)
    return starts


def flat_of(index: CsrIndex) -> Tensor:
    """Flat positions of the entries, int64 [nnz], ascending."""
    rows, cols = index.indices[:, : index.nnz]
    return rows.long().mul_(index.shape[1]).add_(cols)


def values_of(weight: Tensor, index: CsrIndex) -> Tensor:
    """The entries of a dense `weight` in the order of the index, [capacity]; 0 in slots that hold no entry."""
    flat = flat_of(index)
    values = weight.new_zeros(index.capacity)
    values[: flat.numel()] = weight.reshape(-1)[flat]
    return values


def to_dense(values: Tensor, index: CsrIndex) -> Tensor:
    """The dense weight [out, in] of `values` [capacity], with zeros filled in."""
    nnz = index.nnz
    return values.new_zeros(index.shape).index_put_(tuple(index.indices[:, :nnz].long()), values[:nnz])


def _around(indices: Tensor, shape: tuple[int, int], transposed: bool = True) -> CsrIndex:
    """An index whose other tensors are not filled in."""
    rows, columns = shape
    slots = indices.shape[1]
    if max(slots, rows, columns) > _INT32_MAX:
        raise PatternError(
            f"CSR counts in int32: shape {shape} with {slots} entries has more than {_INT32_MAX}"
        )
    sizes = (rows + 1, columns + 1, *(slots * transposed,) * 2)
    return CsrIndex(indices, *(torch.empty(n, dtype=torch.int32, device=indices.device) for n in sizes))
