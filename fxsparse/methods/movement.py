"""Movement pruning: scores that learn which weights move away from 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Choice, Extra, Method, Probe, WeightView, register
from fxsparse.options import check_integer, is_number
from fxsparse.pattern import Pattern, Unstructured
from fxsparse.reparam import ValueMap, Zeros, one_node, with_gradient
from fxsparse.schedule import CubicRamp, Schedule
from fxsparse.scores import score_named
from fxsparse.topk import top_mask


@one_node
def movement_map(weight: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
    """`weight` where `mask`, else 0; g goes to kept weights, and g w to the scores of all."""
    return with_gradient(torch.where(mask, weight.detach(), 0), (weight, mask), (scores, weight.detach()))


@dataclass(frozen=True)
class LargestScore:
    """The pattern's best by the learned scores; equal ones, as all are at first, by magnitude."""

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        return Choice(largest(view.pattern, view.extras["scores"], view.weight().abs(), view.nnz))


def largest(pattern: Pattern, scores: Tensor, sizes: Tensor, nnz: int) -> Tensor:
    """The pattern's mask of the best scores; equal ones by size, and of equal sizes the first.

    A mask of any entries needs no order but that at the cut, so that nothing is sorted.
    """
    if pattern != Unstructured():
        return pattern.project(ranks(scores, sizes), nnz)
    mask = top_mask(scores, nnz)
    cut = scores.masked_fill(~mask, torch.inf).min()
    above = scores > cut
    return above | top_mask(sizes.masked_fill(scores != cut, -torch.inf), nnz - int(above.sum()))


def ranks(first: Tensor, second: Tensor) -> Tensor:
    """float64 places from 0 up: by `first`, where that ties by `second`, and of equal entries the first one last."""
    order = second.flatten().flip(0).argsort(stable=True)
    order = order[first.flatten().flip(0)[order].argsort(stable=True)]
    places = torch.empty(len(order), dtype=torch.float64, device=first.device)
    places[order] = torch.arange(len(order), dtype=torch.float64, device=first.device)
    return places.flip(0).view(first.shape)


def check_phases(steps: int, warmup: int, cooldown: int) -> None:
    """PlanError unless something is left between the first and the last steps of a training."""
    for name, value in (("steps", steps), ("warmup", warmup), ("cooldown", cooldown)):
        check_integer(name, value, 0)
    if warmup + cooldown >= steps:
        raise PlanError(f"expected warmup + cooldown below the {steps} steps, got {warmup} + {cooldown}.")


@register
def movement(
    steps: int = 54_000, warmup: int = 5_400, cooldown: int = 10_800, score_lr: float = 1e-2 / 3e-5
) -> Method:
    """Keep each weight's best entries by a learned score S with gradient ``g w``: Sanh et al. 2020, arXiv:2005.07683.

    For fine-tuning: S grows where a weight moves away from 0.  The share that is kept falls from 1 along a cubic, flat
    for the first `warmup` steps and at the plan's for the last `cooldown` of the `steps`.  Pruned weights keep their
    value and get no gradient.  The scores' learning rate is `score_lr` times that of the weights, without weight decay,
    in ``sparse.parameter_groups(lr, ...)``.  Defaults: SQuAD's 10 epochs at lr 3e-5 and 1e-2.
    """
    if not is_number(score_lr) or score_lr <= 0:
        raise PlanError(f"expected score_lr as a multiple of the learning rate above 0, got {score_lr!r}.")
    check_phases(steps, warmup, cooldown)
    scores = Extra("scores", Zeros(), learned=True, lr=float(score_lr))
    return Method(
        name="movement",
        reparam=ValueMap(movement_map, extras=(scores,)),
        init=score_named("magnitude"),
        rule=LargestScore(),
        schedule=Schedule(every=1, start=1, stop=steps + 1, ramp=CubicRamp(0.0, warmup, steps - cooldown)),
        source="arXiv:2005.07683",
    )
