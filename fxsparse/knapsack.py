"""The rule of Spartan and its baselines: after every step, keep the largest magnitudes that a budget pays for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.method import Probe, WeightView
from fxsparse.pattern import Block, Pattern
from fxsparse.rules import LargestMagnitude
from fxsparse.soft_masks import gather
from fxsparse.topk import top_mask


@dataclass(frozen=True)
class KeepLargest:
    """Masks of the largest ``|w| / cost``, hidden values included; those of all weights share one budget, or each has
    its own.

    `together`: one budget for all.  `sharpness`: how sharp Spartan's soft masks are, None for none.
    """

    together: bool = True
    sharpness: "Sharpness | None" = None

    @property
    def probe(self) -> Probe:
        return Probe.NONE

    def __call__(self, view: WeightView) -> Tensor:
        """The choice of a weight alone."""
        return LargestMagnitude()(view)


@dataclass(frozen=True)
class Sharpness:
    """Beta of the soft masks: linear from 1 to `most` at step `freeze`, when they stop changing.

    A block of n entries has ``most * sqrt(n)``, as the mean over a block varies that much less; weights of one budget
    have one sharpness, that of the largest of their blocks.
    """

    most: float
    freeze: int

    def __call__(self, step: int, block: int = 1) -> float:
        return 1 + (self.most * math.sqrt(block) - 1) * min(1.0, step / self.freeze)


def block_of(pattern: Pattern, transposed: bool = False) -> tuple[int, int]:
    """Rows and columns, in the user's layout, of the entries that the mask keeps or drops together."""
    if not isinstance(pattern, Block):
        return 1, 1
    return (pattern.cols, pattern.rows) if transposed else (pattern.rows, pattern.cols)


def utilities(weight: Tensor, block: tuple[int, int], cost: float) -> Tensor:
    """Magnitude for each unit of cost of every block, in at least fp32; `cost` is that of one block."""
    return gather(weight.detach().abs(), block) / cost


def keep(utility: Sequence[Tensor], costs: Sequence[float], budget: float) -> list[Tensor]:
    """Bool masks of the largest utilities, ties to the first: the fewest whose costs reach `budget`.

    The cost that is kept lies in ``[budget, budget + cost of the last one)``.
    """
    sizes, joined = [u.numel() for u in utility], torch.cat([u.flatten() for u in utility])
    if len(set(costs)) == 1:
        mask = top_mask(joined, min(len(joined), math.ceil(budget / costs[0] - 1e-9)))
    else:
        mask = _keep_costed(
            joined, torch.repeat_interleave(_like(joined, costs), _like(joined, sizes).long()), budget
        )
    return [part.view(u.shape) for part, u in zip(mask.split(sizes), utility, strict=True)]


def _keep_costed(utility: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Halve the range that holds the last one kept until it is short, and sort that alone."""
    low, high = float(utility.min()), float(utility.max())
    while True:
        middle = (low + high) / 2
        between = (utility >= low) & (utility <= high)
        if int(between.sum()) <= 65_536 or not low < middle < high:
            break
        if float(costs[utility > middle].sum(dtype=torch.float64)) >= budget:
            low = math.nextafter(middle, math.inf)
        else:
            high = middle
    mask = utility > high
    missing = budget - float(costs[mask].sum(dtype=torch.float64))
    places = between.nonzero().squeeze(1)
    places = places[utility[places].argsort(descending=True, stable=True)]
    reached = costs[places].double().cumsum(0) - costs[places].double()
    mask[places[reached < missing * (1 - 1e-12)]] = True
    return mask


def _like(tensor: Tensor, numbers: Sequence[float]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64, device=tensor.device)
