"""Top-KAST: sparse forward, a larger set in backward, both by magnitude."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.method import Choice, Extra, Held, Method, Probe, WeightView, register
from fxsparse.options import check_number
from fxsparse.reparam import ValueMap, one_node, with_gradient
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named
from fxsparse.topk import top_mask


@one_node
def top_kast_map(weight: Tensor, mask: Tensor, backward: Tensor) -> Tensor:
    """`weight` where `mask`, else 0; the gradient goes to the entries of `backward`."""
    return with_gradient(torch.where(mask, weight.detach(), 0), (weight, backward))


@dataclass(frozen=True)
class Superset:
    """The entries of a mask and the largest others, `times` as many in all, or everything."""

    times: float

    def __call__(self, weight: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
        del generator
        count = min(mask.numel(), round(self.times * int(mask.sum())))
        return top_mask(weight.detach().abs().masked_fill(mask, torch.inf), count)


@dataclass(frozen=True)
class LargestTwice:
    """A: the pattern's best by magnitude, hidden values included.  B: these, and the next largest of any place."""

    superset: Superset

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        weight = view.weight()
        mask = view.pattern.project(weight.abs(), view.nnz)
        return Choice(mask, {"backward": self.superset(weight, mask)})


@dataclass(frozen=True)
class Exploration:
    """The gradient ``c w`` on A and ``c / d w`` on the rest of B, d the density of A: of ``c/2 |w|^2`` weighted so.

    So entries that only explore have to earn their place; those outside of B keep their value.
    """

    strength: float

    def __call__(self, weights: Sequence[Held], step: int) -> list[dict[str, Tensor]]:
        del step
        return [{"weight": self._of(held)} for held in weights]

    def _of(self, held: Held) -> Tensor:
        inverse = held.mask.numel() / held.mask.sum().clamp_min(1).to(held.weight.dtype)
        factor = torch.where(held.mask, 1, inverse)
        return torch.where(held.extras["backward"], self.strength * factor * held.weight, 0)


@register
def top_kast(
    every: int = 100, backward: float = 2.0, penalty: float = 1e-4, stop: int | None = None
) -> Method:
    """Forward with the largest magnitudes A, weight gradients for a larger set B: Jayakumar et al. 2021,
    arXiv:2106.03517.

    B has `backward` entries for every one of A (2 for the paper's 80 % behind 90 %).  The sets are chosen anew at every
    `every`-th step below `stop`, by magnitude; a weight outside of B keeps its value, whatever momentum and weight
    decay would do, and comes back only where others shrink.  Trainings of some hundreds of steps need ``every=1``, the
    paper's other choice: in between the rest of B learns unseen, and what outgrew A then comes in at once.  `penalty` c
    pulls A by ``c w`` and the rest of B by ``c/d w`` (our reading: half the squared norm; added to gradients after any
    clipping).  The paper's optimizer is SGD without momentum.  The whole weight is stored; what backward saves is
    counted as FLOPs, 2 f(A) + f(B).
    """
    check_number("backward", backward, 1)
    check_number("penalty", penalty, 0)
    superset = Superset(float(backward))
    extra = Extra("backward", superset)
    return Method(
        name="top_kast",
        reparam=ValueMap(top_kast_map, extras=(extra,), gradient_per_entry=superset.times, learns="backward"),
        init=score_named("magnitude"),
        rule=LargestTwice(superset),
        schedule=Schedule(every, stop, start=every),
        source="arXiv:2106.03517",
        penalty=Exploration(float(penalty)) if penalty else None,
    )
