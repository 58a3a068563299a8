"""DSR: dynamic sparse reparameterisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Choice, Extra, Method, Probe, WeightView, register
from fxsparse.options import check_integer, check_positive
from fxsparse.pattern import Unstructured
from fxsparse.redistribution import shares
from fxsparse.reparam import Filled, HardMask
from fxsparse.rules import magnitudes
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named
from fxsparse.topk import top_positions

TOLERANCE = 0.1
"""Relative distance from the wanted number of dropped entries within which the threshold stays."""


@dataclass(frozen=True)
class ThresholdAndReallocate:
    """Every weight drops ``|w| < H``, and as many entries as that are in all are grown at random, where most survive.

    A weight's share of the growth is that of its surviving entries among all.  What does not fit into a weight goes to
    the others; entries that were dropped in this very update come back, the largest first, only where no weight has
    another place.  Afterwards H is halved if more than 1.1 of the wanted number went, doubled if fewer than 0.9.
    """

    wanted: float

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Choice]:
        threshold = views[0].extras["threshold"]
        kept = [_kept(view, threshold) for view in views]
        dropped = [len(view.active) - len(stays) for view, stays in zip(views, kept, strict=True)]
        survivors, grow = [float(len(stays)) for stays in kept], total - sum(map(len, kept))
        free = [prod(view.shape) - len(view.active) for view in views]
        grown = shares(min(grow, sum(free)), survivors, free)
        back = shares(grow - sum(grown), survivors, dropped)
        adapted = threshold * self.feedback(sum(dropped), total)
        return [
            Choice(_grown(view, stays, count, returning), {"threshold": adapted})
            for view, stays, count, returning in zip(views, kept, grown, back, strict=True)
        ]

    def feedback(self, dropped: int, total: int) -> float:
        """What H is multiplied by."""
        wanted = self.wanted if self.wanted >= 1 else self.wanted * total
        if dropped > (1 + TOLERANCE) * wanted:
            return 0.5
        return 2.0 if dropped < (1 - TOLERANCE) * wanted else 1.0


def _kept(view: WeightView, threshold: Tensor) -> Tensor:
    """The active entries from the threshold on, and at least the largest one."""
    size = view.values.detach().abs()
    stays = size >= threshold.to(size.dtype)
    return view.active[stays] if bool(stays.any()) else view.active[top_positions(size, 1)]


def _grown(view: WeightView, kept: Tensor, count: int, returning: int) -> Tensor:
    """`kept`, `count` of the entries that were inactive, and the `returning` largest of those that were dropped."""
    dropped = magnitudes(view, elsewhere=-torch.inf).index_fill(0, kept, -torch.inf)
    drawn = torch.rand(prod(view.shape), generator=view.generator).to(dropped.device)
    drawn[view.active] = -torch.inf
    return torch.cat([kept, top_positions(dropped, returning), top_positions(drawn, count)]).sort().values


@register
def dsr(
    every: int = 1_000,
    stop: int | None = None,
    exchange: float = 0.16,
    threshold: float = 1e-3,
    double: Sequence[int] = (),
    init: str = "random",
) -> Method:
    """Prune by one adaptive threshold, and grow where most weights survive: Mostafa and Wang 2019, arXiv:1902.05967,
    Algorithm 1.

    Updates follow the optimizer's step at every `every`-th below `stop`; at each step of `double` the period doubles
    (the paper's ResNet-50: 1000, 2000, 4000, 8000 from epochs 0, 25, 50, 75 of 100, no update after epoch 95).
    `exchange` is how many entries an update should drop: a share of all nonzeros, or from 1 on their number (400,000
    in the paper, 0.16 of ResNet-50's at 90 %).  The threshold, H, starts at `threshold` and is kept beside every weight
    as ``<weight>_threshold``, the same number for all.  Grown weights start at 0, and are below H until they learn.
    Counts of weights drift, and their total stays as the plan has it.
    """
    check_positive("exchange", exchange)
    check_positive("threshold", threshold)
    if not isinstance(double, Sequence):
        raise PlanError(f"expected double as a sequence of steps, got {double!r}.")
    moments = None if not double else _moments(every, stop, tuple(double))
    return Method(
        name="dsr",
        reparam=HardMask(),
        init=score_named(init),
        rule=ThresholdAndReallocate(float(exchange)),
        schedule=Schedule(every, stop, every if moments is None else 0, at=moments),
        source="arXiv:1902.05967",
        pattern=Unstructured(),
        state=(Extra("threshold", Filled(float(threshold))),),
    )


def _moments(every: int, stop: int | None, double: tuple[int, ...]) -> tuple[int, ...]:
    """The steps of updates whose period doubles."""
    check_integer("every", every, 1)
    for moment in double:
        check_integer("a step of double", moment, 1)
    if stop is None or list(double) != sorted(set(double)) or double[-1] >= stop:
        raise PlanError(f"expected double as ascending steps below stop, got {double!r} and stop={stop}.")
    moments, step = [], every
    while step < stop:
        moments.append(step)
        step += every * 2 ** sum(step >= moment for moment in double)
    return tuple(moments)
