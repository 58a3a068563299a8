"""Supermasks: weights stay as they were drawn, training chooses among them."""

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Extra, Method, register
from fxsparse.methods.movement import LargestScore
from fxsparse.options import is_number
from fxsparse.reparam import Filled, ValueMap, Zeros, one_node, with_gradient
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named


@one_node
def supermask_map(weight: Tensor, mask: Tensor, scores: Tensor, scale: Tensor) -> Tensor:
    """``a w`` where `mask`, else 0; ``a g w`` goes to the scores of all, and what a moves to the number a."""
    kept = with_gradient(torch.where(mask, weight.detach(), 0), (scores, weight.detach()))
    return scale.to(weight.dtype) * kept


@register
def supermask(score_lr: float = 1.0) -> Method:
    """Frozen random weights under a mask of learned scores, times a learned number of the weight: Choi et al. 2023,
    "Is Overfitting Necessary for Implicit Video Representation?", ICML; scores as in Ramanujan et al. 2020,
    arXiv:1911.13299.

    The selected weights do not learn, biases and other weights do.  Scores S start at 0, learn by ``a g w``, and the
    plan's count of the largest is kept after every step, ties by magnitude; their learning rate is `score_lr` times
    that of the weights, without weight decay.  One mask for each weight: the several nested masks of the paper, whose
    counts we do not know, are left out.
    """
    if not is_number(score_lr) or score_lr <= 0:
        raise PlanError(f"expected score_lr as a multiple of the learning rate above 0, got {score_lr!r}.")
    extras = (
        Extra("scores", Zeros(), learned=True, lr=float(score_lr)),
        Extra("scale", Filled(1.0), learned=True),
    )
    return Method(
        name="supermask",
        reparam=ValueMap(supermask_map, extras=extras),
        init=score_named("magnitude"),
        rule=LargestScore(),
        schedule=Schedule(every=1, start=1),
        source="Choi et al. 2023, Is Overfitting Necessary for Implicit Video Representation?, ICML",
        freezes_weights=True,
    )
