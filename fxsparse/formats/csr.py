"""CSR with its transposed index: the training layout of unstructured weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import PatternError

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class CsrIndex:
    """Where the nonzeros of a weight [out, in] are; all int32, and all changed in place by `move_`.

    `indices` alone decides the rest.  Order of entries: by row, then by column, as in `values` [nnz].
    """

    indices: Tensor
    """[2, nnz]: row and column of every entry; the one tensor to save."""
    crow: Tensor
    """[out + 1]: where each row starts in `values`."""
    ccol: Tensor
    """[in + 1]: where each column starts in the column-major order."""
    rows_t: Tensor
    """[nnz]: row of each entry, in column-major order."""
    perm: Tensor
    """[nnz]: position in `values` of each entry, in column-major order."""

    @property
    def cols(self) -> Tensor:
        """[nnz]: column of every entry, a view of `indices`."""
        return self.indices[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.crow.numel() - 1, self.ccol.numel() - 1


def from_flat(flat: Tensor, shape: tuple[int, int]) -> CsrIndex:
    """The index of the entries at flat positions `flat` (int64 [nnz], ascending) of a weight of `shape`."""
    index = from_indices(
        torch.empty(2, flat.numel(), dtype=torch.int32, device=flat.device), shape, filled=False
    )
    move_(index, flat)
    return index


def from_mask(mask: Tensor) -> CsrIndex:
    """The index of the true entries of `mask` [out, in]."""
    return from_flat(mask.reshape(-1).nonzero().squeeze(1), (mask.shape[0], mask.shape[1]))


def from_indices(indices: Tensor, shape: tuple[int, int], *, filled: bool = True) -> CsrIndex:
    """The index around an existing `indices` tensor (kept, not copied), as a checkpoint has it."""
    rows, columns = shape
    nnz = indices.shape[1]
    if max(nnz, rows, columns) > _INT32_MAX:
        raise PatternError(
            f"CSR counts in int32: shape {shape} with {nnz} entries has more than {_INT32_MAX}"
        )
    sizes = (rows + 1, columns + 1, nnz, nnz)
    index = CsrIndex(indices, *(torch.empty(n, dtype=torch.int32, device=indices.device) for n in sizes))
    if filled:
        move_(index, flat_of(index))
    return index


def move_(index: CsrIndex, flat: Tensor) -> None:
    """Move the entries, in place, to the flat positions `flat` (int64 [nnz], strictly ascending, same count).

    PatternError where the count differs, or a position is repeated, out of order or outside the weight.
    """
    rows, columns = index.shape
    if flat.numel() != index.perm.numel():
        raise PatternError(
            f"the layout holds exactly {index.perm.numel()} entries, got {flat.numel()}: build a new one"
        )
    if flat.numel():
        if int(flat[0]) < 0 or int(flat[-1]) >= rows * columns or not bool((flat.diff() > 0).all()):
            raise PatternError(
                f"positions must be strictly ascending and inside the {rows} x {columns} weight"
            )
        index.indices[0] = flat // columns
        index.indices[1] = flat % columns
    _fill(index)


def flat_of(index: CsrIndex) -> Tensor:
    """Flat positions of the entries, int64 [nnz], ascending."""
    rows, cols = index.indices.long()
    return rows * index.shape[1] + cols


def values_of(weight: Tensor, index: CsrIndex) -> Tensor:
    """The entries of a dense `weight` in the order of the index, [nnz]."""
    return weight.reshape(-1)[flat_of(index)]


def to_dense(values: Tensor, index: CsrIndex) -> Tensor:
    """The dense weight [out, in] with zeros filled in."""
    return values.new_zeros(index.shape).index_put_(tuple(index.indices.long()), values)


def _fill(index: CsrIndex) -> None:
    rows, cols = index.indices
    for starts, positions in ((index.crow, rows), (index.ccol, cols)):
        starts[0] = 0
        starts[1:] = torch.bincount(positions, minlength=starts.numel() - 1).cumsum(0)
    order = torch.argsort(cols, stable=True)
    index.perm.copy_(order)
    index.rows_t.copy_(rows[order])
