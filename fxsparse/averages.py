"""Averages of a module over its training (EMA, SWA), which are copies of it: compact ones have to follow the masks.

An average adds up stored values slot by slot, and in compact storage a slot stands for another entry after an update.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxsparse.errors import CheckpointError
from fxsparse.ranks import fingerprint
from fxsparse.selection import MaskChange
from fxsparse.storage import CompactWeight, MaskedWeight

Weights = Mapping[str, CompactWeight | MaskedWeight]


@dataclass
class CopiedEntries:
    """Where the compact weights of a copy had their entries, as long as it follows no optimizer of its own."""

    prints: dict[str, Tensor] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)

    def note(self, weights: Weights) -> None:
        """Take the entries as they are now for right."""
        self.prints = {name: fingerprint(weight.active()) for name, weight in compact(weights)}
        self._versions = {name: weight.indices._version for name, weight in compact(weights)}

    def forget(self) -> None:
        """The copy goes its own way: it trains, or was loaded."""
        self.prints = {}

    def check(self, weights: Weights) -> None:
        """Raise CheckpointError where other entries were written over these, and values were not taken along."""
        for name, weight in compact(weights) if self.prints else ():
            if weight.indices._version == self._versions.get(name):
                continue
            if not torch.equal(fingerprint(weight.active()), self.prints[name].to(weight.indices.device)):
                raise CheckpointError(
                    f"{name!r}: this copy has averaged values by slot, and since it was made masks have moved: its "
                    "numbers stand for other entries than its indices say. Call sparse.attach_average(averaged) right "
                    "after making an average in compact storage, average after the last mask update, or train masked."
                )
            self._versions[name] = weight.indices._version


def follow(weights: Weights, name: str, change: MaskChange) -> None:
    """Let the average of one weight take its values along; what is grown starts at 0, what is pruned is gone."""
    weight = weights.get(name)
    if isinstance(weight, CompactWeight):
        weight.move(change, None)


def compact(weights: Weights) -> Iterator[tuple[str, CompactWeight]]:
    """Those that are stored as nonzeros."""
    return ((name, weight) for name, weight in weights.items() if isinstance(weight, CompactWeight))
