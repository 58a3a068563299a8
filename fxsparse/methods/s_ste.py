"""S-STE: continuous 2:4, and the unbiased 2:4 estimate of output gradients."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Extra, Method, register
from fxsparse.pattern import NM
from fxsparse.reparam import ValueMap, one_node, with_gradient
from fxsparse.rng import uniform_at
from fxsparse.rules import LargestMagnitude
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named

OTHERS = [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
"""Of each of four, the places of the other three."""


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


def keep_probabilities(size: Tensor) -> Tensor:
    """How likely `mvue24` keeps each of four magnitudes, [..., 4]; they sum to 2 where two are above 0."""
    total = size.sum(-1, keepdim=True)
    others = size[..., OTHERS].sum(-1)
    first = torch.where(total > 0, size / total, 0)
    after = torch.where(others > 0, first / others, 0)
    return first + size * after[..., OTHERS].sum(-1)


def mvue24(tensor: Tensor, numbers: Tensor) -> Tensor:
    """Two of every four of the last dimension, divided by how likely they are kept, so that its mean is `tensor`.

    The first is drawn in proportion to magnitude, the second likewise of what is left: the approximation of
    arXiv:2203.10991, section 4.  `numbers`: uniform in [0, 1), [2, ..., groups].
    """
    groups = tensor.reshape(*tensor.shape[:-1], -1, 4)
    size = groups.abs().to(torch.promote_types(tensor.dtype, torch.float32))
    likely = keep_probabilities(size)
    kept = torch.zeros_like(size, dtype=torch.bool)
    for number in numbers:
        left = size.masked_fill(kept, 0).cumsum(-1)
        place = (left <= number[..., None] * left[..., -1:]).sum(-1, keepdim=True).clamp_max(3)
        kept = kept.scatter(-1, place, True)
    scale = torch.where(kept & (likely > 0), 1 / likely.clamp_min(torch.finfo(size.dtype).tiny), 0)
    return (groups * scale.to(tensor.dtype)).reshape(tensor.shape)


@one_node
def mvue_linear(
    x: Tensor, effective: Tensor, bias: Tensor | None, mask: Tensor, beta: Tensor, step: Tensor, key: int
) -> Tensor:
    """``F.linear`` whose weight gradient is that of the output gradient made 2:4 along the samples by `mvue24`."""
    del mask, beta
    return _MvueLinear.apply(x, effective, bias, step, key)


class _MvueLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, effective: Tensor, bias: Tensor | None, step: Tensor, key: int
    ) -> Tensor:
        ctx.save_for_backward(x, effective, step.clone())
        ctx.key = key
        return F.linear(x, effective, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, effective, step = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        columns = F.pad(rows.t(), (0, -len(rows) % 4))
        numbers = uniform_at(step, ctx.key, (2, len(columns), columns.shape[1] // 4))
        thin = mvue24(columns, numbers)[:, : len(rows)]
        into = grads[0] @ effective.to(rows.dtype) if ctx.needs_input_grad[0] else None
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return into, thin @ x.reshape(len(rows), -1).to(rows.dtype), bias, None, None


@register
def s_ste(mvue: bool = False) -> Method:
    """Train ``beta * sign(w) relu(|w| - t)``, 2:4 and continuous in w, straight through: Hu et al. 2024,
    arXiv:2409.09099.

    t is the second smallest magnitude of four, so that nothing jumps when entries swap places; beta is fixed at the
    start.  No decay and no dense phase.  `mvue` makes the output gradients 2:4 for the weight gradient, unbiased and
    with numbers of the step (off here; on in the paper), linear layers only; the FLOP count goes on without it.  The
    paper trains the linear layers of feed-forward blocks: exclude the others.  Weights stored [in, out] are refused.
    """
    if not isinstance(mvue, bool):
        raise PlanError(f"expected mvue as True or False, got {mvue!r}.")
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
