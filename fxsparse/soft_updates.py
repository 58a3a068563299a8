"""The one node of the update graph where all weights choose within budgets: Spartan, and its baselines."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse import sharding
from fxsparse.errors import CheckpointError
from fxsparse.knapsack import KeepLargest, afford, block_of, keep, refuse_diverged, utilities
from fxsparse.method import Method
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
    weights = [(sharding.whole(weight), *rest) for weight, *rest in weights]  # type: ignore[misc]
    return tuple(
        _spend(step, rule, row, members) for row, members in zip(numbers, shared(rule, weights), strict=True)
    )


def shared(rule: KeepLargest, weights: Sequence[Any]) -> list[Sequence[Any]]:
    """The weights of every budget: all of them, or each alone."""
    return [weights] if rule.together else [[weight] for weight in weights]


def _spend(step: UpdateStep, rule: KeepLargest, numbers: Tensor, members: Sequence[Stored]) -> bool:
    """One budget.  Masks are a matter of values, so that weights without a gradient take part as any other."""
    targets = [step.targets[name] for *_, name in members]
    blocks = [block_of(target.pattern, target.transposed) for target in targets]
    costs = [target.cost * rows * columns for target, (rows, columns) in zip(targets, blocks, strict=True)]
    each = [
        utilities(weight, block, cost)
        for (weight, *_), block, cost in zip(members, blocks, costs, strict=True)
    ]
    for (weight, *_, name), utility in zip(members, each, strict=True):
        refuse_diverged(weight, utility, name, f"after step {step.number}")
    masks, budget = _chosen(step, targets, each, costs, [math.prod(block) for block in blocks])
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


def refuse_averaged(
    method: Method, step: int, targets: Mapping[str, Target], masks: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError where masks keep more than their budget pays for after so many optimizer steps, as the
    average of masks of several steps does.  Other methods than those of `KeepLargest` are let through.
    """
    rule = method.rule
    if not isinstance(rule, KeepLargest) or not targets:
        return
    for names in shared(rule, list(targets)):
        counts = {name: int(masks[name].sum()) for name in names}
        prices = {n: of for n in names if (of := targets[n].price) is not None}
        if rule.together and prices:
            if method.nnz(step, 0, 2**40):
                continue  # on the way there masks go by the mean cost of an entry
            got, most = sum(of(counts[n]) for n, of in prices.items()), targets[names[0]].limit
            slack = 1e-9 * abs(most)
        else:
            kept, size = (
                sum(each)
                for each in zip(*((targets[n].budget, masks[n].numel()) for n in names), strict=True)
            )
            got, most = sum(counts.values()), method.nnz(step, kept, size)
            slack = max(math.prod(block_of(targets[n].pattern, targets[n].transposed)) for n in names)
        if got > most + slack:
            raise CheckpointError(
                f"the masks of {', '.join(names[:3])}{', ...' * (len(names) > 3)} keep {got:,.7g} where the budget "
                f"after {step} steps is {most:,.7g}: expected masks of one step of this plan. Masks cannot be "
                "averaged: average parameters alone (AveragedModel(module, use_buffers=False), which copies the masks)."
            )


def _chosen(
    step: UpdateStep,
    targets: Sequence[Target],
    each: Sequence[Tensor],
    costs: Sequence[float],
    sizes: Sequence[int],
) -> tuple[list[Tensor], float]:
    """Masks of the largest utilities, and what they may cost by `costs`, of an entry of the mask.

    Where the plan has a budget, its true prices decide how many of them stay in the end.
    """
    final, dense = (
        sum(count * t.cost for t, count in zip(targets, counts, strict=True))
        for counts in ([t.budget for t in targets], [torch.Size(t.shape).numel() for t in targets])
    )
    rule = step.method.rule
    assert isinstance(rule, KeepLargest)
    masks = _paid_for(targets, each, sizes) if rule.together else None
    if masks is not None:
        final = sum(int(mask.sum()) * cost for mask, cost in zip(masks, costs, strict=True))
        if step.method.nnz(step.number, 0, 2**40) == 0:
            return masks, final
    if all(target.cost == 1 for target in targets):
        budget = float(step.method.nnz(step.number, round(final), round(dense)))
    else:
        budget = final + (dense - final) * step.method.nnz(step.number, 0, 2**40) / 2**40
    return keep(each, costs, budget), budget


def _paid_for(targets: Sequence[Target], each: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor] | None:
    """Masks of the largest utilities that the plan's budget pays for; None where it has a sparsity instead."""
    prices = [target.price for target in targets if target.price is not None]
    if len(prices) < len(targets):
        return None

    def price(counts: Sequence[int]) -> float:
        return sum(of(count * size) for of, count, size in zip(prices, counts, sizes, strict=True))

    dense = sum(of(torch.Size(t.shape).numel()) for of, t in zip(prices, targets, strict=True))
    return afford(each, price, targets[0].limit + 1e-12 * dense)


def _move(step: UpdateStep, member: Stored, mask: Tensor) -> bool:
    weight, old, _, name = member
    store = MaskedWeight(weight, old, step.targets[name].transposed)
    logical = mask.t() if store.transposed else mask
    step.history.record_masks(name, step.number, store.logical_mask(), logical)
    return store.rewrite(logical)
