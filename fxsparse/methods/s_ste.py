"""S-STE: continuous 2:4."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Extra, Method, register
from fxsparse.mvue import mvue_linear
from fxsparse.options import check_flag
from fxsparse.pattern import NM
from fxsparse.reparam import ValueMap, one_node, with_gradient
from fxsparse.rules import LargestMagnitude
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named


def soft24(weight: Tensor) -> Tensor:
    """``sign(w) relu(|w| - t)``, t the second smallest magnitude of every 4 input channels; arXiv:2409.09099, eq. 8."""
    groups = weight.reshape(weight.shape[0], -1, 4, *weight.shape[2:])
    size = groups.abs()
    threshold = size.sort(2).values[:, :, 1:2]
    return (groups.sign() * (size - threshold).clamp_min(0)).reshape(weight.shape)


@one_node
def s_ste_map(weight: Tensor, mask: Tensor, beta: Tensor) -> Tensor:
    """``beta * soft24(w)``, straight through; 0 outside of `mask` without reading it."""
    del mask
    with torch.no_grad():
        value = beta.to(weight.dtype) * soft24(weight)
    return with_gradient(value, (weight, None))


@dataclass(frozen=True)
class Beta:
    """``<w, S> / <S, S>`` for S = soft24(w): the scale that comes closest to w, at the start; 1 where S is 0."""

    def __call__(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        del generator
        counts = mask.reshape(mask.shape[0], -1, 4, *mask.shape[2:]).sum(2)
        if bool((counts != 2).any()):
            raise PlanError(
                f"s_ste: expected masks with 2 of every 4 input channels, got {sorted(set(counts.unique().tolist()))}. "
                "Leave the pattern of the plan and its overrides out; it is NM(2, 4). exclude= keeps a weight dense."
            )
        precise = weight.detach().double()
        soft = soft24(precise)
        square = (soft * soft).sum()
        return torch.where(square > 0, (precise * soft).sum() / square, 1.0).float()


@register
def s_ste(mvue: bool = False) -> Method:
    """Train ``beta * sign(w) relu(|w| - t)``, 2:4 and continuous in w, straight through: Hu et al. 2024,
    arXiv:2409.09099.

    t is the second smallest magnitude of four, so that nothing jumps when entries swap places; beta is fixed at the
    start.  No decay and no dense phase.  `mvue` makes the output gradients 2:4 for the weight gradient, unbiased and
    with numbers of the step (off here; on in the paper), linear layers only; the FLOP count goes on without it.  The
    paper trains the linear layers of feed-forward blocks: exclude the others.  Weights stored [in, out] are refused.
    """
    check_flag("mvue", mvue)
    return Method(
        name="s_ste",
        reparam=ValueMap(
            s_ste_map, extras=(Extra("beta", Beta()),), by_rows=True, linear=mvue_linear if mvue else None
        ),
        init=score_named("magnitude"),
        rule=LargestMagnitude(),
        schedule=Schedule(every=1, start=1),
        source="arXiv:2409.09099",
        pattern=NM(2, 4),
    )
