"""What a graph keeps for each model that Dynamo runs it for: models of one class share graphs, not weights."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar
from weakref import ReferenceType, ref

from torch import Tensor

Kept = TypeVar("Kept")


class ByWeights(Generic[Kept]):
    """A value for each set of tensors that a graph is called with, for as long as all of them live.

    Args:
        positions: where those tensors are among the graph's inputs.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = tuple(positions)
        self._kept: dict[tuple[int, ...], tuple[Kept, list[ReferenceType[Tensor]]]] = {}

    def __len__(self) -> int:
        """How many sets are alive."""
        return len(self._kept)

    def get(self, args: Sequence[Any]) -> Kept | None:
        """The value for the tensors of this call; None where there is none."""
        found = self._kept.get(self._key(args))
        return None if found is None else found[0]

    def put(self, args: Sequence[Any], value: Kept) -> Kept:
        """Keep a value for the tensors of this call, which are held weakly; returns it."""
        kept, key = self._kept, self._key(args)

        def forget(_: object) -> None:
            kept.pop(key, None)  # before any other tensor can have one of these ids

        kept[key] = (value, [ref(args[position], forget) for position in self.positions])
        return value

    def _key(self, args: Sequence[Any]) -> tuple[int, ...]:
        return tuple([id(args[position]) for position in self.positions])
