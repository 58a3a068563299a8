"""The one node of the update graph where all weights choose within budgets: Spartan, and its baselines."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse.knapsack import KeepLargest, block_of, keep, utilities
from fxsparse.soft_masks import BETA, FROZEN, SHIFT, spread
from fxsparse.storage import MaskedWeight
from fxsparse.update_mask import Target, UpdateStep

Stored = tuple[Any, Tensor, Tensor | None, str]
"""Parameter, mask, soft mask (None where the method has none) and name of a weight."""


@torch.no_grad()
def keep_largest(step: UpdateStep, numbers: Tensor, weights: Sequence[Stored]) -> tuple[bool, ...]:
    """Move masks and soft masks of all weights in place, and write what backward needs into `numbers` [budgets, 3];
    for every budget whether a mask moved.
    """
    rule = step.method.rule
    assert isinstance(rule, KeepLargest)
    return tuple(
        _spend(step, rule, row, members) for row, members in zip(numbers, shared(rule, weights), strict=True)
    )


def shared(rule: KeepLargest, weights: Sequence[Any]) -> list[Sequence[Any]]:
    """The weights of every budget: all of them, or each alone."""
    return [weights] if rule.together else [[weight] for weight in weights]


def _spend(step: UpdateStep, rule: KeepLargest, numbers: Tensor, members: Sequence[Stored]) -> bool:
    """One budget.  Masks are a matter of values, so that weights without a gradient take part as any other."""
    targets = [step.targets[name] for *_, name in members]
    budget = budget_at(step, targets)
    blocks = [block_of(target.pattern, target.transposed) for target in targets]
    costs = [target.cost * rows * columns for target, (rows, columns) in zip(targets, blocks, strict=True)]
    each = [
        utilities(weight, block, cost)
        for (weight, *_), block, cost in zip(members, blocks, costs, strict=True)
    ]
    masks = keep(each, costs, budget)
    moved = [
        _move(step, member, spread(mask, block, member[0].shape))
        for member, mask, block in zip(members, masks, blocks, strict=True)
    ]
    if rule.sharpness is not None:
        beta = rule.sharpness(step.number, max(math.prod(block) for block in blocks))
        values = [u * cost for u, cost in zip(each, costs, strict=True)]
        numbers[BETA] = beta
        numbers[SHIFT] = torch.ops.fxsparse.soft_topk_shift(
            values,
            [v.new_full((1,), cost) for v, cost in zip(values, costs, strict=True)],
            numbers.new_tensor(budget),
            numbers[BETA],
        )
        for (weight, mask, soft, _), utility, block in zip(members, each, blocks, strict=True):
            assert soft is not None
            whole = torch.sigmoid(beta * utility + numbers[SHIFT].to(utility.dtype))
            soft.copy_(torch.where(mask, spread(whole, block, weight.shape), 0))
    numbers[FROZEN] = float(step.method.schedule is not None and step.number + 1 == step.method.schedule.stop)
    return any(moved)


def budget_at(step: UpdateStep, targets: Sequence[Target]) -> float:
    """What the weights of one budget may keep after this update, in entries of cost 1."""
    final = sum(target.nnz * target.cost for target in targets)
    dense = sum(torch.Size(target.shape).numel() * target.cost for target in targets)
    if all(target.cost == 1 for target in targets):
        return float(step.method.nnz(step.number, int(final), int(dense)))
    return final + (dense - final) * step.method.nnz(step.number, 0, 2**40) / 2**40


def _move(step: UpdateStep, member: Stored, mask: Tensor) -> bool:
    weight, old, _, name = member
    store = MaskedWeight(weight, old, step.targets[name].transposed)
    logical = mask.t() if store.transposed else mask
    step.history.record_masks(name, step.number, store.logical_mask(), logical)
    return store.rewrite(logical)
