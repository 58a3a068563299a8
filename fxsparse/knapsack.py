"""The rule of Spartan and its baselines: after every step, keep the largest magnitudes that a budget pays for."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import NumericsError
from fxsparse.method import Probe, WeightView
from fxsparse.pattern import Block, Pattern
from fxsparse.rules import LargestMagnitude
from fxsparse.soft_masks import gather
from fxsparse.topk import top_of_all

SHORT = 65_536
"""Values that are sorted rather than halved."""


@dataclass(frozen=True)
class KeepLargest:
    """Masks of the largest ``|w| / cost``, hidden values included; those of all weights share one budget, or each has
    its own.

    `together`: one budget for all.  `sharpness`: how sharp Spartan's soft masks are, None for none.
    """

    together: bool = True
    sharpness: "Sharpness | None" = None

    probe = Probe.NONE

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


def refuse_diverged(weight: Tensor, utility: Tensor, name: str, when: str) -> None:
    """Raise NumericsError where what is to be ranked, and `weight` that it is of, holds NaN or inf."""
    if utility.amax().isfinite():  # hands a NaN through
        return
    bad = {"NaN": int(weight.isnan().sum()), "inf": int(weight.isinf().sum())}
    got = " and ".join(f"{count} {kind}" for kind, count in bad.items() if count) or "a sum that overflows"
    raise NumericsError(
        f"weight {name!r}: expected finite values to rank {when}, got {got} among {weight.numel()} entries. "
        "Training has diverged: look at the loss and the learning rate before this, and clip the gradients' norm."
    )


def keep(utility: Sequence[Tensor], costs: Sequence[float], budget: float) -> list[Tensor]:
    """Bool masks of the largest utilities, ties to the first: the fewest whose costs reach `budget`.

    The cost that is kept lies in ``[budget, budget + cost of the last one)`` (arXiv 2205.14107, Algorithm 3).
    """
    if len(set(costs)) == 1:
        entries = sum(u.numel() for u in utility)
        return top_of_all(utility, min(entries, math.ceil(budget / costs[0] - 1e-9)))

    def spent(counts: Sequence[int]) -> float:
        return sum(count * cost for count, cost in zip(counts, costs, strict=True))

    almost = budget * (1 - 1e-12)
    masks = afford(utility, spent, almost)
    if spent([int(mask.sum()) for mask in masks]) < almost:
        _add_next(utility, masks)
    return masks


def _add_next(utility: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Put the largest that no mask has, the first of equal ones, into its mask; in place."""
    left = [(u.masked_fill(mask, -math.inf), mask) for u, mask in zip(utility, masks, strict=True)]
    best, mask = max(left, key=lambda pair: float(pair[0].max()))
    mask[torch.unravel_index(best.argmax(), mask.shape)] |= best.max() > -math.inf


def afford(utility: Sequence[Tensor], price: Callable[[Sequence[int]], float], limit: float) -> list[Tensor]:
    """Bool masks of the largest utilities, ties to the first: the most whose counts have a price of at most `limit`.

    `price` says what so many of each of the tensors cost together, and never falls as counts rise.  The range that
    holds the last one kept is halved until it is short, and that alone is sorted.
    """
    between, kept = [u.flatten() for u in utility], [0] * len(utility)
    low, high = min(float(u.min()) for u in between), max(float(u.max()) for u in between)
    while sum(map(len, between)) > SHORT and low < (middle := (low + high) / 2) < high:
        above = [u > middle for u in between]
        counts = _sums(kept, (int(part.sum()) for part in above))
        if price(counts) > limit:
            low, between = middle, [u[part] for u, part in zip(between, above, strict=True)]
        else:
            high, kept = middle, counts
            between = [u[~part] for u, part in zip(between, above, strict=True)]
    values, owners = _ranked(between)

    def counts_with(more: int) -> list[int]:
        return _sums(kept, torch.bincount(owners[:more], minlength=len(kept)).tolist())

    more = bisect_right(range(1, len(values) + 1), limit, key=lambda n: price(counts_with(n)))
    least = float(values[more - 1]) if more else high
    return [_first_of(u, least, count) for u, count in zip(utility, counts_with(more), strict=True)]


def _ranked(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All values from the largest on, ties to the first, and which of the parts each is of."""
    values, order = torch.cat(list(parts)).sort(descending=True, stable=True)
    sizes = torch.tensor([len(part) for part in parts], device=order.device)
    return values, torch.repeat_interleave(torch.arange(len(parts), device=order.device), sizes)[order]


def _first_of(utility: Tensor, least: float, count: int) -> Tensor:
    """Bool mask of what is above `least`, and of the first that equal it up to `count` in all."""
    mask = utility > least
    if missing := count - int(mask.sum()):
        ties = (utility == least).flatten()
        mask |= (ties & (ties.cumsum(0) <= missing)).view(mask.shape)
    return mask


def _sums(some: Sequence[int], others: Iterable[int]) -> list[int]:
    return [a + b for a, b in zip(some, others, strict=True)]
