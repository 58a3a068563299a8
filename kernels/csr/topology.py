"""Moving nonzeros: the index of a CSR weight for new positions, and what a move changes.

Call them as ``torch.ops.fxsparse.csr_move_`` and ``.position_change``: they run in C++ once the kernels are loaded, and
never ask for them to be built, as masked storage trains without.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernels.library import define


def move_(flat: Tensor, indices: Tensor, crow: Tensor, ccol: Tensor, rows_t: Tensor, perm: Tensor) -> Tensor:
    """Write the index (``formats.csr.CsrIndex``) of the entries at positions `flat` into the other tensors.

    `rows_t` and `perm` are left alone where they have no elements.

    The result is a bool scalar: false, with nothing changed, unless `flat` (int64 [nnz], at most the capacity) is
    strictly ascending and inside the weight.  The host reads nothing.
    """
    columns = ccol.numel() - 1
    numel = (crow.numel() - 1) * columns
    is_valid = torch.cat([flat[:1] >= 0, flat[-1:] < numel, flat.diff() > 0]).all()
    inside = flat.clamp(0, numel - 1) if numel else flat[:0]  # what is counted until that is known
    rows, cols = inside // max(columns, 1), inside % max(columns, 1)
    made = [(starts, _starts(places, starts)) for starts, places in ((crow, rows), (ccol, cols))]
    order = torch.argsort(cols, stable=True) if perm.numel() else cols
    transposed = ((rows_t, rows[order]), (perm, order)) if perm.numel() else ()
    for slots, entries in ((indices[0], rows), (indices[1], cols), *transposed):
        made.append((slots, F.pad(entries, (0, len(slots) - len(entries)), value=-1)))
    for tensor, new in made:
        tensor.copy_(torch.where(is_valid, new.to(tensor.dtype), tensor))
    return is_valid


def _starts(places: Tensor, starts: Tensor) -> Tensor:
    """Where each of the places begins, counted without asking the device for the largest of them."""
    counts = torch.zeros(starts.numel(), dtype=torch.int64, device=places.device)
    return counts.scatter_add_(0, places + 1, torch.ones_like(places)).cumsum(0)


def position_change(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(positions of `old` only, of `new` only, where the others stand in `old`, and in `new`).

    All int64 and ascending, `old` and `new` without repeats.
    """
    slot = torch.searchsorted(old, new)
    known = F.pad(old, (0, 1), value=-1)[slot] == new  # a position is 0 or more
    kept = int(known.sum())  # the one number that is read: with it every shape is known
    kept_to = known.nonzero_static(size=kept).squeeze(1)
    kept_from = slot[kept_to]
    left = torch.ones_like(old, dtype=torch.bool).index_fill_(0, kept_from, False)
    pruned, grown = (
        positions[mask.nonzero_static(size=len(mask) - kept).squeeze(1)]
        for positions, mask in ((old, left), (new, ~known))
    )
    return pruned, grown, kept_from, kept_to


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
