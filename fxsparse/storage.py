"""Where a sparse weight lives while it trains: dense beside a mask, or nonzeros only.

Both forms answer the same questions in the *logical* layout, [rows, fan-in] with row-major flat positions, so that an
update rule cannot tell them apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse import optimizer_state, sharding
from fxsparse.formats import block_index, csr
from fxsparse.graph import fetch, owner
from fxsparse.kernel import Entries
from fxsparse.method import Extra, Reparam, extras_of
from fxsparse.selection import MaskChange


@dataclass(frozen=True)
class MaskedWeight:
    """A dense parameter and its mask, both in the user's layout."""

    parameter: nn.Parameter
    mask: Tensor
    transposed: bool = False
    """The user's layout is [in, out]."""
    soft: Tensor | None = None
    """What the parameter is multiplied by where masks are not binary; it counts within the mask alone."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """The method's `Extra` tensors by name, in the user's layout."""

    @property
    def factor(self) -> Tensor:
        """What the effective weight is a multiple by: the soft mask, cut to the mask, or the mask."""
        return self.mask if self.soft is None else self.soft * self.mask

    def folded(self, reparam: Reparam) -> Tensor:
        """The effective weight as a plain tensor in the user's layout."""
        extras = [sharding.whole(self.extras[extra.name]) for extra in extras_of(reparam)]
        return reparam.fold(sharding.whole(self.parameter), self.factor, *extras)

    def logical(self, tensor: Tensor) -> Tensor:
        """A tensor beside the weight in the logical layout, where it has the weight's shape; a view."""
        return tensor.t() if self.transposed and tensor.shape == self.parameter.shape else tensor

    def logical_extras(self) -> dict[str, Tensor]:
        """The extras, detached and in the logical layout."""
        return {name: self.logical(sharding.whole(tensor)) for name, tensor in self.extras.items()}

    @torch.no_grad()
    def write_extras(self, values: Mapping[str, Tensor]) -> None:
        """Take over new values, given in the logical layout, in place."""
        for name, value in values.items():
            self.logical(self.extras[name].detach()).copy_(value)

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] or [out, in, *kernel]."""
        shape = tuple(self.parameter.shape)
        return shape[::-1] if self.transposed else shape

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as [rows, fan-in]; a copy where strides do not allow a view."""
        return tensor.t() if self.transposed else tensor.reshape(tensor.shape[0], -1)

    def active(self) -> Tensor:
        """Flat positions of the active entries, int64, ascending."""
        return self.rows(self.mask).flatten().nonzero().flatten()

    def values_at(self, positions: Tensor) -> Tensor:
        """The weights at `positions`."""
        return self.at(sharding.whole(self.parameter), positions)

    def at(self, tensor: Tensor, positions: Tensor) -> Tensor:
        """The entries at `positions` of a tensor in the user's layout, such as the gradient."""
        return tensor[self._entries(positions)]

    @torch.no_grad()
    def fill(self, positions: Tensor, values: Tensor) -> None:
        """Write these weights at `positions`, in place."""
        self.parameter[self._entries(positions)] = values.to(self.parameter.dtype)

    def dense(self) -> Tensor:
        """The weight in the logical shape, hidden values included."""
        weight = sharding.whole(self.parameter)
        return weight.t() if self.transposed else weight

    @torch.no_grad()
    def move(
        self,
        change: MaskChange,
        optimizer: torch.optim.Optimizer | None,
        exact_zeros: bool,
        keeps_state: bool = False,
    ) -> None:
        """Apply the change in place.

        With `exact_zeros` grown entries start at 0, pruned ones leave nothing behind, and the optimizer state of both
        is zero, unless the method keeps it; otherwise the hidden weights live on and only the mask moves.
        """
        pruned, grown = self._entries(change.pruned), self._entries(change.grown)
        self.mask[pruned] = False
        self.mask[grown] = True
        if not exact_zeros:
            return
        for entries in (pruned, grown):
            sharding.here(self.parameter)[sharding.entries(self.parameter, entries)] = 0
            if optimizer is not None and not keeps_state:
                optimizer_state.reset(optimizer, self.parameter, entries)

    def logical_mask(self) -> Tensor:
        """The mask in the logical shape; a view."""
        return self.mask.t() if self.transposed else self.mask

    @torch.no_grad()
    def rewrite(self, mask: Tensor) -> bool:
        """Take over a mask of the logical shape, in place and without touching the weight; whether it differs."""
        mask = mask.t() if self.transposed else mask
        if torch.equal(mask, self.mask):
            return False
        self.mask.copy_(mask)
        return True

    def _entries(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Index of flat logical positions into a tensor of the user's layout, whatever its strides."""
        if not self.transposed:
            return torch.unravel_index(positions, self.parameter.shape)
        fan_in = self.parameter.shape[0]
        return positions % fan_in, positions // fan_in


class CompactWeight(nn.Module):
    """A weight as its nonzeros: takes the place of the dense parameter in the module that owned it.

    That of a convolution is indexed as the matrix [out, in / groups * kernel], which has the same flat positions.
    There is room for `capacity` entries, and a move may use less of it.  Unused slots follow the last entry: 0 in
    `values` and in its gradient, -1 in the indices.  A weight that trains in blocks of `side` x `side` has no unused
    slot, and what block kernels read beside its index.

    Attributes:
        values: nn.Parameter [capacity], row-major order.
        indices: int32 [2, capacity], rows and columns; with `values` all that a checkpoint holds.
        crow, ccol, rows_t, perm: the row pointers and the transposed index, derived and not saved.  The last two have
            no elements for a convolution, whose kernels go by rows alone, and for a weight in blocks.
        block_to_blocks, block_to_entries and so on: `formats.block_index.PARTS`, of a weight in blocks only; derived.
    """

    values: nn.Parameter
    indices: Tensor
    crow: Tensor
    ccol: Tensor
    rows_t: Tensor
    perm: Tensor

    shape: tuple[int, ...]
    """[out, in] or [out, in / groups, *kernel]."""
    side: int | None

    def __init__(
        self,
        shape: tuple[int, ...],
        positions: Tensor,
        values: Tensor,
        capacity: int | None = None,
        side: int | None = None,
    ) -> None:
        """The entries `values` [nnz] at flat `positions` [nnz], with room for `capacity`, by default for no more."""
        super().__init__()
        self.shape, self.side = shape, side
        by_columns = len(shape) == 2 and side is None
        index = csr.from_flat(positions, self.matrix_shape, capacity, transposed=by_columns)
        self.values = nn.Parameter(F.pad(values, (0, index.capacity - len(values))))
        self.register_buffer("indices", index.indices)
        for name in ("crow", "ccol", "rows_t", "perm"):
            self.register_buffer(name, getattr(index, name), persistent=False)
        if side is not None:
            for name, part in block_index.of_csr(index, side).items():
                self.register_buffer(f"block_{name}", part, persistent=False)

    @property
    def index(self) -> csr.CsrIndex:
        """The index buffers as they are now."""
        return csr.CsrIndex(self.indices, self.crow, self.ccol, self.rows_t, self.perm)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, fan-in)."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def dense_bytes(self) -> int:
        """What the dense weight would take."""
        return prod(self.shape) * self.values.element_size()

    def active(self) -> Tensor:
        """Flat positions of the stored entries, int64, ascending."""
        return csr.flat_of(self.index)

    def values_at(self, positions: Tensor) -> Tensor:
        """The stored values, [nnz]; `positions` are all of `active`."""
        return sharding.whole(self.values)[: len(positions)]

    @torch.no_grad()
    def move(self, change: MaskChange, optimizer: torch.optim.Optimizer | None) -> None:
        """Apply the change in place within the capacity; values and optimizer state travel with their coordinates."""
        states = () if optimizer is None else tuple(optimizer_state.per_element(optimizer, self.values))
        self._index_by(change.new)
        for tensor in (self.values, *states):
            carried = change.carry(sharding.whole(tensor))
            padded = F.pad(carried, (0, tensor.numel() - len(carried)))
            sharding.here(tensor).copy_(sharding.part(tensor, padded))

    @torch.no_grad()
    def reindex(self) -> None:
        """Rebuild in place what is derived from `indices`, after something else was loaded into them."""
        self._index_by(csr.positions_in(self.indices, self.matrix_shape))

    def _index_by(self, positions: Tensor) -> None:
        blocks = {}
        if self.side is not None:  # first, since it refuses entries that fill no blocks
            blocks = block_index.of_flat(positions, self.matrix_shape, self.index.capacity, self.side)
        csr.move_(self.index, positions)
        for name, part in blocks.items():
            self.get_buffer(f"block_{name}").copy_(part)

    @torch.no_grad()
    def zero_unused(self) -> None:
        """Keep the slots that hold no entry at exactly 0."""
        unused = sharding.part(self.values, self.indices[0] < 0)
        sharding.here(self.values).masked_fill_(unused, 0)  # their number is on the device, and stays there

    def entries(self) -> Entries:
        """The stored entries, as views."""
        nnz = self.index.nnz
        return Entries(sharding.whole(self.values)[:nnz], self.indices[:, :nnz], self.shape)

    def dense(self) -> Tensor:
        """The dense weight, zeros filled in."""
        return csr.to_dense(sharding.whole(self.values), self.index).view(self.shape)

    def extra_repr(self) -> str:
        blocks = "" if self.side is None else f", blocks of {self.side} x {self.side}"
        return (
            f"{'x'.join(map(str, self.shape))}, nnz={self.index.nnz}, capacity={self.index.capacity}{blocks}"
        )


def read_weights(
    tree: nn.Module, transposed: Mapping[str, bool], extras: Sequence[Extra] = ()
) -> Iterator[tuple[str, MaskedWeight | CompactWeight]]:
    """(name, storage) of the named sparse weights; {name: whether the user stores it [in, out]}."""
    for name, is_transposed in transposed.items():
        weight = fetch(tree, name)
        if isinstance(weight, CompactWeight):
            yield name, weight
        else:
            module, leaf = owner(tree, name)
            soft = module._buffers.get(f"{leaf}_soft")
            beside = {extra.name: fetch(tree, f"{name}_{extra.name}") for extra in extras}
            yield name, MaskedWeight(weight, fetch(tree, f"{name}_mask"), is_transposed, soft, beside)
