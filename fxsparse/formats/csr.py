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
    """[capacity]: row of each entry, in column-major order."""
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
        return self.perm.numel()

    @property
    def nnz(self) -> int:
        """How many entries there are."""
        return int(self.crow[-1])


def from_flat(flat: Tensor, shape: tuple[int, int], capacity: int | None = None) -> CsrIndex:
    """The index of the entries at flat positions `flat` (int64 [nnz], ascending) of a weight of `shape`.

    There is room for `capacity` entries, by default for these and no more.
    """
    slots = flat.numel() if capacity is None else capacity
    index = _around(torch.empty(2, slots, dtype=torch.int32, device=flat.device), shape)
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
    rows, cols = indices[:, :nnz].long()
    inside = bool(((rows >= 0) & (rows < shape[0]) & (cols >= 0) & (cols < shape[1])).all())
    if not inside or not bool((indices[:, nnz:] == -1).all()):
        raise PatternError(
            f"expected rows and columns inside the {shape[0]} x {shape[1]} weight, and -1 in every slot "
            "after the last entry"
        )
    flat = rows * shape[1] + cols
    _check(flat, shape)
    return flat


def move_(index: CsrIndex, flat: Tensor) -> None:
    """Let the entries be, in place, those at the flat positions `flat` (int64 [nnz], strictly ascending).

    PatternError where they are more than the capacity, or a position is repeated, out of order or outside the weight.
    """
    nnz, (_, columns) = flat.numel(), index.shape
    if nnz > index.capacity:
        raise PatternError(f"the layout has room for {index.capacity} entries, got {nnz}: build a new one")
    _check(flat, index.shape)
    index.indices[0, :nnz] = flat // columns
    index.indices[1, :nnz] = flat % columns
    index.indices[:, nnz:] = -1
    _fill(index, nnz)


def flat_of(index: CsrIndex) -> Tensor:
    """Flat positions of the entries, int64 [nnz], ascending."""
    rows, cols = index.indices[:, : index.nnz].long()
    return rows * index.shape[1] + cols


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


def _around(indices: Tensor, shape: tuple[int, int]) -> CsrIndex:
    """An index whose other tensors are not filled in."""
    rows, columns = shape
    slots = indices.shape[1]
    if max(slots, rows, columns) > _INT32_MAX:
        raise PatternError(
            f"CSR counts in int32: shape {shape} with {slots} entries has more than {_INT32_MAX}"
        )
    sizes = (rows + 1, columns + 1, slots, slots)
    return CsrIndex(indices, *(torch.empty(n, dtype=torch.int32, device=indices.device) for n in sizes))


def _check(flat: Tensor, shape: tuple[int, int]) -> None:
    rows, columns = shape
    if flat.numel() == 0:
        return
    if int(flat[0]) < 0 or int(flat[-1]) >= rows * columns or not bool((flat.diff() > 0).all()):
        raise PatternError(f"positions must be strictly ascending and inside the {rows} x {columns} weight")


def _fill(index: CsrIndex, nnz: int) -> None:
    """Everything but `indices` from its first `nnz` entries."""
    rows, cols = index.indices[:, :nnz]
    for starts, positions in ((index.crow, rows), (index.ccol, cols)):
        starts[0] = 0
        starts[1:] = torch.bincount(positions, minlength=starts.numel() - 1).cumsum(0)
    order = torch.argsort(cols, stable=True)
    for tensor, entries in ((index.perm, order), (index.rows_t, rows[order])):
        tensor[:nnz] = entries
        tensor[nnz:] = -1
