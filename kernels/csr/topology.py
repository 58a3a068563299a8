"""Moving nonzeros: the index of a CSR weight for new positions, and what a move changes.

Call them as ``torch.ops.fxsparse.csr_move_`` and ``.position_change``: they run in C++ once the kernels are loaded, and
never ask for them to be built, as masked storage trains without.
"""

import torch
from torch import Tensor

from fxsparse.kernels.library import define


def move_(flat: Tensor, indices: Tensor, crow: Tensor, ccol: Tensor, rows_t: Tensor, perm: Tensor) -> Tensor:
    """Write the index (``formats.csr.CsrIndex``) of the entries at positions `flat` into the other tensors.

    `rows_t` and `perm` are left alone where they have no elements.

    The result is a bool scalar: false, with nothing written, unless `flat` (int64 [nnz], at most the capacity) is
    strictly ascending and inside the weight.
    """
    columns = ccol.numel() - 1
    nnz, numel = flat.numel(), (crow.numel() - 1) * columns
    if nnz and (int(flat[0]) < 0 or int(flat[-1]) >= numel or not bool((flat.diff() > 0).all())):
        return flat.new_zeros((), dtype=torch.bool)
    rows, cols = flat // max(columns, 1), flat % max(columns, 1)
    for starts, places in ((crow, rows), (ccol, cols)):
        starts[0] = 0
        starts[1:] = torch.bincount(places, minlength=starts.numel() - 1).cumsum(0)
    order = torch.argsort(cols, stable=True) if perm.numel() else cols
    transposed = ((rows_t, rows[order]), (perm, order)) if perm.numel() else ()
    for slots, entries in ((indices[0], rows), (indices[1], cols), *transposed):
        slots[:nnz] = entries
        slots[nnz:] = -1
    return flat.new_ones((), dtype=torch.bool)


def position_change(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(positions of `old` only, of `new` only, where the others stand in `old`, and in `new`).

    All int64 and ascending, `old` and `new` without repeats.
    """
    slot = torch.searchsorted(old, new)
    known = slot < len(old)
    known[known.clone()] = old[slot[known]] == new[known]
    kept_from = slot[known]
    left = torch.ones_like(old, dtype=torch.bool)
    left[kept_from] = False
    return old[left], new[~known], kept_from, known.nonzero().squeeze(1)


def _move_fake(flat: Tensor, *_: Tensor) -> Tensor:
    return flat.new_empty((), dtype=torch.bool)


def _position_change_fake(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = torch.library.get_ctx()
    pruned, grown, kept = (sizes.new_dynamic_size() for _ in range(3))
    return old.new_empty(pruned), old.new_empty(grown), old.new_empty(kept), old.new_empty(kept)


define(
    "csr_move_(Tensor flat, Tensor(a!) indices, Tensor(b!) crow, Tensor(c!) ccol, Tensor(d!) rows_t, "
    "Tensor(e!) perm) -> Tensor",
    move_,
    _move_fake,
)
define(
    "position_change(Tensor old, Tensor new) -> (Tensor, Tensor, Tensor, Tensor)",
    position_change,
    _position_change_fake,
)
