"""What an armed backward saw at the call sites of sparse weights, and the sums that are read off it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernels import probe
from fxsparse.method import Signs

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_DIMENSIONS = {
    **{F.conv1d: 3, F.conv2d: 4, F.conv3d: 5},
    **dict(zip(_TRANSPOSED, (3, 4, 5), strict=True)),
}
"""Of an input with its batch."""
_KEYS = itertools.count()


@dataclass
class Watched:
    """One op on one weight whose backward is watched; a copy leaves what it sees under a key of its own."""

    name: str
    op: Callable[..., Tensor]
    arguments: dict[str, Any]
    """Keyword arguments apart from input, weight and bias; of a linear op on one of n equal pieces of the weight's rows
    ``part``, (which, n)."""
    key: int = field(default_factory=_KEYS.__next__, compare=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watched":
        del memo
        return Watched(self.name, self.op, dict(self.arguments))


@dataclass
class ProbeSwitch:
    """Whether this training step collects what the next update needs; one object shared by all that must know."""

    on: bool = False
    exploring: bool = False
    """The batch is for the next update only."""
    ran: bool = False
    """A forward collected since this was last decided; the replay of a CUDA graph runs none."""
    watched: list[Watched] = field(default_factory=list)

    def watch(
        self, name: str, op: Callable[..., Tensor] = F.linear, arguments: Mapping[str, Any] | None = None
    ) -> Watched:
        """What is watched of this op on the weight `name`; the same object for the same arguments."""
        new = Watched(name, op, dict(arguments or {}))
        if new not in self.watched:
            self.watched.append(new)
        return self.watched[self.watched.index(new)]

    def keys(self, name: str) -> list[int]:
        """Where backwards through the weight `name` leave what they saw."""
        return [watched.key for watched in self.watched if watched.name == name]

    def observed(self, name: str) -> list["Observed"]:
        """What was left there, not copied."""
        return [
            Observed(x, grad, watched.op, watched.arguments)
            for watched in self.watched
            if watched.name == name
            for x, grad in probe.PROBES.get(watched.key, ())
        ]


@dataclass(frozen=True)
class Evidence:
    """What an update chooses by; each by weight name, and empty where the rule needs none."""

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """Dense gradients of masked weights, in the user's layout."""
    observed: Mapping[str, Sequence["Observed"]] = field(default_factory=dict)

    def __add__(self, more: "Evidence") -> "Evidence":
        """Both together, as backwards of one step add up."""
        names = {*self.observed, *more.observed}
        gradients = dict(self.gradients)
        for name, gradient in more.gradients.items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return Evidence(
            gradients, {name: [*self.observed.get(name, ()), *more.observed.get(name, ())] for name in names}
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(weight name, tensor) of all that was seen."""
        yield from self.gradients.items()
        for name, seen in self.observed.items():
            yield from ((name, tensor) for one in seen for tensor in (one.inputs, one.gradients))


@dataclass(frozen=True, eq=False)
class Observed:
    """One backward through one call site: the op's input and the gradient of its output."""

    inputs: Tensor
    gradients: Tensor
    op: Callable[..., Tensor] = F.linear
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def terms(self) -> int:
        """How many products of an input and an output gradient each entry of the weight gradient adds up.

        They are numbered by sample, then by position (row-major): tokens of a linear layer, output positions of a
        convolution, input positions of a transposed one.
        """
        rows = self._sides[self._is_transposed]
        return rows.numel() // rows.shape[1]

    def sums(self, shape: Sequence[int], signs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sums of the two factors of those products: of their magnitudes or, with `signs` [terms], signed.

        Returns (columns [groups, fan-in], rows [shape[0]]) for a weight of `shape`, in at least fp32; the pieces of a
        linear weight that is read in parts are groups.
        """
        gradients, inputs = (side.abs() if signs is None else side for side in self._sides)
        rows = inputs if self._is_transposed else gradients
        each = rows.new_ones(self.terms) if signs is None else signs.to(rows)
        if self.op is F.linear:
            return self._in_part((each @ inputs).unsqueeze(0), each @ rows)
        each = each.view(len(rows), 1, *rows.shape[2:])
        row_sums = (rows * each).movedim(1, 0).flatten(1).sum(1)
        return self._patch_sums(shape, gradients if self._is_transposed else inputs, each), row_sums

    def _in_part(self, columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sums in the place of the piece of the weight that the op reads, and 0 for the other pieces."""
        if "part" not in self.arguments:
            return columns, rows
        which, pieces = self.arguments["part"]
        others = [torch.zeros_like(columns)] * pieces, [torch.zeros_like(rows)] * pieces
        others[0][which], others[1][which] = columns, rows
        return torch.cat(others[0]), torch.cat(others[1])

    def _patch_sums(self, shape: Sequence[int], patched: Tensor, each: Tensor) -> Tensor:
        """[groups, fan-in]: sums over patches are the gradient of a weight that has one row in each group."""
        groups = self.arguments.get("groups", 1)
        row = patched.new_zeros(groups, *shape[1:], requires_grad=True)
        each = each.expand(-1, groups, *each.shape[2:])
        with torch.enable_grad():
            y = self.op(each if self._is_transposed else patched, row, None, **self.arguments)
            (sums,) = torch.autograd.grad(y, row, patched if self._is_transposed else each)
        return sums.flatten(1)

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """Output gradients and inputs, [samples, features, *positions] or [tokens, features]."""
        pair = (self.gradients, self.inputs)
        if self.op is F.linear:
            return tuple(_wide(side).reshape(-1, side.shape[-1]) for side in pair)  # type: ignore[return-value]
        return tuple(_wide(s) if s.dim() == _DIMENSIONS[self.op] else _wide(s).unsqueeze(0) for s in pair)  # type: ignore[return-value]

    @property
    def _is_transposed(self) -> bool:
        """The rows of the weight belong to the inputs."""
        return self.op in _TRANSPOSED


def marginals(
    observed: Iterable[Observed], shape: Sequence[int], signs: Signs | None = None
) -> tuple[Tensor, Tensor] | None:
    """`Observed.sums` over all that was observed, on all ranks; None if nothing was.

    `signs` gives a term the same sign in both sums, and no two terms share a number.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    total, first = None, 0
    for seen in observed:
        numbers = torch.arange(first, first + seen.terms) * world + rank
        sums = seen.sums(shape, None if signs is None else signs(numbers))
        total = sums if total is None else (total[0] + sums[0], total[1] + sums[1])
        first += seen.terms
    if total is not None:
        for part in total:
            sum_over_ranks(part)
    return total


def sum_over_ranks(tensor: Tensor) -> None:
    """Add up, in place, what every rank holds of a tensor; without a process group nothing happens."""
    if _is_distributed():
        dist.all_reduce(tensor)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
