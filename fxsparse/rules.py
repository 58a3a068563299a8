"""Update rules that methods share, and the growth criteria they are put together from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fxsparse.method import Choice, Probe, WeightView
from fxsparse.pattern import Pattern, Unstructured
from fxsparse.scores import random_tiles
from fxsparse.selection import random_positions, to_positions, union
from fxsparse.topk import top_of_all

Tiles = Iterator[tuple[int, Tensor]]
"""(first row, scores [rows, fan_in]) in ascending row order."""


class Growth(Protocol):
    """Which entries are grown."""

    probe: ClassVar[Probe]

    def fill(self, view: WeightView, kept: Tensor) -> Tensor:
        """The positions `kept` and others, ``view.nnz`` in all and as the pattern allows; int64, ascending."""
        ...


@dataclass(frozen=True)
class GradientMagnitude:
    """Grow where the dense gradient is largest (RigL, arXiv:1911.11134)."""

    probe: ClassVar[Probe] = Probe.DENSE

    def fill(self, view: WeightView, kept: Tensor) -> Tensor:
        return filled(view, kept, self.tiles(view))

    def tiles(self, view: WeightView) -> Tiles:
        return ((first, gradient.detach().abs()) for first, gradient in view.gradient_tiles())


@dataclass(frozen=True)
class UniformRandom:
    """Grow anywhere (SET, arXiv:1707.04780), every set of so many inactive entries as likely as any other.

    An unstructured mask of at most half the entries takes time and memory in proportion to its nnz; other patterns
    draw a score for every entry, in row tiles.
    """

    probe: ClassVar[Probe] = Probe.NONE

    def fill(self, view: WeightView, kept: Tensor) -> Tensor:
        numel = prod(view.shape)
        if not isinstance(view.pattern, Unstructured) or 2 * view.nnz > numel:
            return filled(view, kept, random_tiles(view.shape, view.generator, kept.device))
        return union(kept, random_positions(view.nnz - len(kept), numel, view.generator, kept))


@dataclass(frozen=True)
class PruneGrow:
    """Drop ``int(n * drop_fraction)`` of the n active entries by magnitude, then grow to nnz by a criterion.

    Only active entries can be dropped, zeros among them included.  A dropped entry may be grown again.  Where
    the pattern has quotas (rows, groups) dropping ignores them and growing fills them up; blocks are dropped
    whole, as many as it takes to drop at least that many entries.
    """

    grow: Growth

    @property
    def probe(self) -> Probe:
        return self.grow.probe

    def __call__(self, view: WeightView) -> Tensor:
        budget = min(len(view.active), view.nnz)
        drop = int(budget * view.drop_fraction)
        if drop == 0 and len(view.active) == view.nnz:
            return view.active
        kept = _largest_active(view, budget - drop)
        return self.grow.fill(view, kept)


@dataclass(frozen=True)
class LargestMagnitude:
    """Take the pattern's best by magnitude over the whole weight, hidden values included (GMP, SR-STE)."""

    probe = Probe.NONE

    def mask(self, weight: Tensor, pattern: Pattern, nnz: int) -> Tensor:
        """The choice as a bool mask of the weight's shape."""
        return pattern.project(weight.detach().abs(), nnz)

    def __call__(self, view: WeightView) -> Tensor:
        return to_positions(self.mask(view.weight(), view.pattern, view.nnz))


@dataclass(frozen=True)
class LargestOfAll:
    """Keep the largest magnitudes of all weights together: one global cut (AC/DC, GraNet, HyperSparse).

    Where there are to be more entries than are active, those come back that are first in order of weights and
    positions; all of them, where there is to be no zero.  `forget`: the optimizer's state starts anew whenever entries
    come back.
    """

    forget: bool = False

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Choice]:
        kept = cut(views, total)
        grows = total > sum(len(view.active) for view in views)
        return [
            Choice(mask.view(view.shape), forget=self.forget and grows)
            for view, mask in zip(views, kept, strict=True)
        ]


def cut(views: Sequence[WeightView], total: int) -> list[Tensor]:
    """Flat bool masks of the `total` largest magnitudes among active entries; inactive ones come after every other."""
    return top_of_all([magnitudes(view, elsewhere=-1.0) for view in views], total)


def magnitudes(view: WeightView, elsewhere: float) -> Tensor:
    """Flat ``|w|`` of the active entries, and `elsewhere` for all others: a score for every place of the weight."""
    whole = view.values.new_full((prod(view.shape),), elsewhere)
    return whole.index_copy_(0, view.active, view.values.detach().abs())


def _largest_active(view: WeightView, keep: int) -> Tensor:
    score = view.values.detach().abs()
    return view.active[view.pattern.prune(score, view.active, view.shape, keep)]


def filled(view: WeightView, kept: Tensor, tiles: Tiles) -> Tensor:
    """`kept` and the best others by their score, as the pattern allows."""
    scores = put(torch.inf, kept, tiles, prod(view.shape[1:]))
    return view.pattern.project_tiles(scores, view.shape, view.nnz)


def put(value: float, positions: Tensor, tiles: Tiles, fan_in: int) -> Tiles:
    """Copies of the tiles with `value` at flat positions (ascending), and nowhere else infinite."""
    for first, tile in tiles:
        scores = tile.clamp(max=torch.finfo(tile.dtype).max).contiguous()
        ends = torch.tensor([first * fan_in, (first + len(tile)) * fan_in], device=positions.device)
        low, high = torch.searchsorted(positions, ends).tolist()
        scores.view(-1)[positions[low:high] - first * fan_in] = value
        yield first, scores
