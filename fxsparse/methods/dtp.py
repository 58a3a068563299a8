"""DTP: learned scores through an optimal transport that sharpens as it goes on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.method import Choice, Extra, Method, Probe, WeightView, register
from fxsparse.methods.movement import largest
from fxsparse.options import check_integer, check_number, check_positive
from fxsparse.reparam import Filled, ValueMap, one_node
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named
from fxsparse.topk import soft_topk

LEAST_EPS = 1e-6
"""Scores begin near 1, and so close to each other float32 does not tell them apart: masks are hard from the start."""


@one_node
def dtp_map(weight: Tensor, mask: Tensor, scores: Tensor, sharpness: Tensor) -> Tensor:
    """``w m`` where `mask`, else 0, for ``m = sigmoid(sharpness * s - shift)`` with as large a sum as the mask's.

    Differentiable in w and in s as if nothing were cut.
    """
    soft = soft_topk(scores, mask.sum(), beta=sharpness).to(weight.dtype)
    product = weight * soft
    return product + (torch.where(mask, product, 0) - product).detach()


@dataclass(frozen=True)
class Relative:
    """|w| over its mean: scores that begin with the order of magnitudes, and at one scale in every layer."""

    def __call__(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        del mask, generator
        size = weight.detach().abs()
        return size / size.mean().clamp_min(torch.finfo(size.dtype).tiny)


@dataclass(frozen=True)
class SharperAndSharper:
    """The largest scores, equal ones by magnitude; sharpness t / eps, t one more after every `every` steps."""

    eps: float
    every: int

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        scores = view.extras["scores"]
        sharpness = (1 + view.step // self.every) / self.eps
        return Choice(
            largest(view.pattern, scores, view.weight().abs(), view.nnz),
            {"sharpness": view.extras["sharpness"].new_full((), sharpness)},
        )


@register
def dtp(eps: float = 1.0, every: int = 1, score_lr: float = 1.0) -> Method:
    """Weights times a soft top-k of learned scores: after Li et al. 2023, arXiv:2307.08483.

    The paper moves uniform mass on scores to a Bernoulli target by one Sinkhorn sweep a batch under a proximal term,
    which lowers the temperature by itself.  What is ours, as its equations and hyper-parameters were not at hand: the
    problem with two columns has the solution ``sigmoid((s - tau) / eps)`` with ``sum m = k``, solved exactly
    (`fxsparse.topk.soft_topk`; single sweeps miss the budget), and t proximal steps at a fixed cost are ``eps / t``.
    t grows after each `every` steps.  Entries below the k-th are cut in the forward, straight through, so that counts
    hold at every step.  Scores start at |w| over its mean, k is the plan's from the start, and the scores' learning
    rate is `score_lr` times that of the weights, without weight decay.
    """
    check_number("eps", eps, LEAST_EPS)
    check_positive("score_lr", score_lr)
    check_integer("every", every, 1)
    scores = Extra("scores", Relative(), learned=True, lr=float(score_lr))
    return Method(
        name="dtp",
        reparam=ValueMap(dtp_map, extras=(scores, Extra("sharpness", Filled(1 / eps)))),
        init=score_named("magnitude"),
        rule=SharperAndSharper(float(eps), every),
        schedule=Schedule(every=1, start=1),
        source="arXiv:2307.08483",
    )
