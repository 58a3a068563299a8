"""Spartan's effective weight ``theta * soft``: a soft top-k of magnitudes, cut to the entries that a hard one keeps.

The soft mask is made after an optimizer step and stays until the next, as a buffer beside the weight.  Backward looks
through it into the magnitudes that it came from, those of other weights included: they share a budget, so that what one
gains the others lose.  Tai et al. 2022, arXiv:2205.14107, algorithms 3 and 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxsparse.method import MaskFunction, Probe

SHIFT, BETA, FROZEN = range(3)
"""Places in the numbers of a budget, fp64 [3]: what `fxsparse.topk.soft_topk` solved for, its sharpness, and 1 from
when the masks no longer change, when their gradient goes to the kept entries alone."""

Block = tuple[int, int]
"""Rows and columns of a weight that share one entry of the mask; (1, 1) for none."""


def shared_shift(
    numbers: Tensor, weights: Sequence[Tensor], blocks: Sequence[Block], costs: Sequence[float]
) -> Tensor:
    """``numbers[SHIFT]``, which depends on all `weights`: its gradient reaches each of them."""
    if has_torch_function((numbers, *weights)):
        return handle_torch_function(shared_shift, (numbers, *weights), numbers, weights, blocks, costs)
    return _SharedShift.apply(numbers, tuple(blocks), tuple(costs), *weights)


@dataclass(frozen=True)
class SoftMask:
    """Spartan's effective weight, ``weight * soft``; the whole weight learns until the masks are frozen."""

    exact_zeros: bool = field(default=False, init=False, repr=False)
    probe: Probe = field(default=Probe.DENSE, init=False, repr=False)

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        del dense_grad
        return soft_mask, ()

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool, *extras: Tensor) -> Tensor:
        del dense_grad, extras
        return soft_mask(weight, mask)

    def fold(self, weight: Tensor, mask: Tensor, *extras: Tensor) -> Tensor:
        return weight.detach() * mask


@dataclass(frozen=True)
class AveragedMask:
    """A hard mask whose dropped entries go on learning until it is frozen: dual averaging."""

    exact_zeros: bool = field(default=False, init=False, repr=False)
    probe: Probe = field(default=Probe.DENSE, init=False, repr=False)

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        del dense_grad
        return averaged_mask, ()

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool, *extras: Tensor) -> Tensor:
        del dense_grad, extras
        return averaged_mask(weight, mask)

    def fold(self, weight: Tensor, mask: Tensor, *extras: Tensor) -> Tensor:
        return averaged_mask(weight.detach(), mask)


def soft_mask(
    weight: Tensor,
    mask: Tensor,
    soft: Tensor | None = None,
    numbers: Tensor | None = None,
    shift: Tensor | None = None,
    block: Block = (1, 1),
    cost: float = 1.0,
) -> Tensor:
    """``weight * soft`` where `mask`, else 0, also where an averaged `soft` is not; the cut is straight through for
    the gradient.

    Without the others there is no gradient but that of the cut.
    """
    if has_torch_function((weight, mask)):
        return handle_torch_function(
            soft_mask, (weight, mask), weight, mask, soft, numbers, shift, block, cost
        )
    if soft is None or numbers is None or shift is None:
        return weight * mask
    return _SoftMask.apply(weight, mask, soft, numbers, shift, block, cost)


def averaged_mask(weight: Tensor, mask: Tensor, numbers: Tensor | None = None) -> Tensor:
    """`weight` where `mask`, else 0; the gradient goes to all entries, and once frozen to those of the mask."""
    if has_torch_function((weight, mask)):
        return handle_torch_function(averaged_mask, (weight, mask), weight, mask, numbers)
    return torch.where(mask, weight, 0) if numbers is None else _AveragedMask.apply(weight, mask, numbers)


class _AveragedMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(mask, numbers)
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        mask, numbers = ctx.saved_tensors
        return torch.where(mask | (numbers[FROZEN] == 0), grads[0], 0), None, None


class _SharedShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, numbers: Tensor, blocks: tuple[Block, ...], costs: tuple[float, ...], *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(numbers, *weights)
        ctx.blocks, ctx.costs = blocks, costs
        return numbers[SHIFT].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        numbers, *weights = ctx.saved_tensors
        slopes = [_slope(w, numbers, b, c) for w, b, c in zip(weights, ctx.blocks, ctx.costs, strict=True)]
        total = torch.stack(
            [c * s.sum(dtype=torch.float64) for s, c in zip(slopes, ctx.costs, strict=True)]
        ).sum()
        factor = torch.where(total > 0, -grads[0] * numbers[BETA] / total, 0)
        into = [
            w.sign() * spread(factor.to(s.dtype) * s, b, w.shape).to(w.dtype)
            for w, s, b in zip(weights, slopes, ctx.blocks, strict=True)
        ]
        return None, None, None, *into


class _SoftMask(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        mask: Tensor,
        soft: Tensor,
        numbers: Tensor,
        shift: Tensor,
        block: Block,
        cost: float,
    ) -> Tensor:
        ctx.save_for_backward(weight, mask, soft, numbers)
        ctx.block, ctx.cost = block, cost
        return torch.where(mask, weight * soft, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        weight, mask, soft, numbers = ctx.saved_tensors
        # Before the first step there is no sharpness yet, and the masks are ones as they come.
        grad, live = grads[0], (1 - numbers[FROZEN]) * (numbers[BETA] > 0)
        x = _logits(weight, numbers, ctx.block, ctx.cost)
        whole = torch.sigmoid(x)
        through = live.to(whole.dtype) * gather(weight * grad, ctx.block) * whole * torch.sigmoid(-x)
        into_value = (numbers[BETA] / ctx.cost).to(whole.dtype) * through
        scale = torch.where(live > 0, spread(whole, ctx.block, weight.shape).to(weight.dtype), soft * mask)
        into_weight = scale * grad + weight.sign() * spread(into_value, ctx.block, weight.shape).to(
            weight.dtype
        )
        return into_weight, None, None, None, through.sum(dtype=torch.float64), None, None


def gather(tensor: Tensor, block: Block) -> Tensor:
    """Sums over blocks of the first two dimensions, in at least fp32: [rows / block, columns / block, ...]."""
    precise = tensor if tensor.dtype == torch.float64 else tensor.float()
    if block == (1, 1):
        return precise
    rows, columns = tensor.shape[0] // block[0], tensor.shape[1] // block[1]
    return precise.reshape(rows, block[0], columns, block[1], *tensor.shape[2:]).sum((1, 3))


def spread(tensor: Tensor, block: Block, shape: Sequence[int]) -> Tensor:
    """One number for each block, given to all of its entries: of the weight's `shape`."""
    if block == (1, 1):
        return tensor
    return tensor.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1).reshape(shape)


def _logits(weight: Tensor, numbers: Tensor, block: Block, cost: float) -> Tensor:
    value = gather(weight.abs(), block)
    return (numbers[BETA] / cost).to(value.dtype) * value + numbers[SHIFT].to(value.dtype)


def _slope(weight: Tensor, numbers: Tensor, block: Block, cost: float) -> Tensor:
    """``m * (1 - m)`` of every block."""
    x = _logits(weight, numbers, block, cost)
    return torch.sigmoid(x) * torch.sigmoid(-x)
