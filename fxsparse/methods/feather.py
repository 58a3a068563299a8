"""Feather: a family of thresholds between soft and hard, with a scaled straight-through gradient."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Choice, Extra, Method, Probe, WeightView, register
from fxsparse.options import check_integer, is_number
from fxsparse.pattern import Unstructured
from fxsparse.reparam import Filled, ValueMap, one_node, with_gradient
from fxsparse.schedule import CubicRamp, Schedule
from fxsparse.scores import score_named
from fxsparse.topk import top_mask


@one_node
def feather_map(weight: Tensor, mask: Tensor, threshold: Tensor, power: float, theta: float) -> Tensor:
    """``sign(w) (|w|^p - T^p)^(1/p)`` where `mask`, else 0; the gradient is g there and theta g elsewhere."""
    with torch.no_grad():
        size = weight.abs().to(torch.promote_types(weight.dtype, torch.float32))
        shrunk = (size**power - threshold**power).clamp_min(0) ** (1 / power)
        value = torch.where(mask, weight.sign() * shrunk.to(weight.dtype), 0)
        factor = torch.where(mask, 1.0, theta).to(weight.dtype)
    return with_gradient(value, (weight, factor))


@dataclass(frozen=True)
class QuantileOfAll:
    """Keep the largest magnitudes of all weights together, hidden values included, and write the threshold T: the
    quantile at the share of zeros, interpolated between the largest that goes and the smallest that stays.
    """

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Choice]:
        sizes = [view.weight().abs().flatten() for view in views]
        joined = torch.cat(sizes)
        kept = top_mask(joined, total)
        threshold = quantile(joined, kept, total)
        masks = kept.split([len(size) for size in sizes])
        return [
            Choice(mask.view(view.shape), {"threshold": threshold})
            for view, mask in zip(views, masks, strict=True)
        ]


def quantile(sizes: Tensor, kept: Tensor, total: int) -> Tensor:
    """What ``numpy.quantile(sizes, 1 - total / len(sizes))`` is, by the mask of the `total` largest; 0 if all stay."""
    if total == len(sizes):
        return sizes.new_zeros(())
    low = sizes.masked_fill(kept, -torch.inf).max()
    high = sizes.masked_fill(~kept, torch.inf).min() if total else low
    return torch.lerp(low, high, total / len(sizes))


@register
def feather(
    steps: int = 62_500, ramp: float = 0.5, power: float = 3.0, theta: float = 1.0, start: int = 0
) -> Method:
    """Train ``sign(w) (|w|^p - T^p)^(1/p)``, T one quantile of all magnitudes: Glentis Georgoulakis et al. 2023,
    arXiv:2310.02448.

    After every step the masks keep the largest magnitudes, along a cubic from all to the plan's total over the first
    `ramp` of the `steps`; they go on moving to the end.  All weights learn straight through; `theta` scales the
    gradient of those at 0: the authors have 1, and 0.5 above 95 % sparsity.  Adam divides by the size of its gradients,
    so that theta does nothing while an entry stays at 0; with SGD it does.  Inference folds the shrunk values.  `power`
    1 is the soft threshold (ST-3), a large one the hard one.  Defaults: 160 epochs of CIFAR at
    batch 128, from step `start` on.
    """
    for name, value, low, high in (("theta", theta, 0, 1), ("ramp", ramp, 0, 1), ("power", power, 1, 100)):
        if not is_number(value) or not low <= value <= high:
            raise PlanError(f"expected {name} as a number from {low} to {high}, got {value!r}.")
    check_integer("steps", steps, 1)
    check_integer("start", start, 0)
    if start >= steps:
        raise PlanError(f"expected start below the {steps} steps, got {start}: nothing would ever be pruned.")
    threshold = Extra("threshold", Filled(0.0))
    return Method(
        name="feather",
        reparam=ValueMap(feather_map, (float(power), float(theta)), (threshold,)),
        init=score_named("magnitude"),
        rule=QuantileOfAll(),
        schedule=Schedule(
            every=1, start=1, stop=steps + 1, ramp=CubicRamp(0.0, start, max(start + 1, int(ramp * steps)))
        ),
        source="arXiv:2310.02448",
        pattern=Unstructured(),
    )
