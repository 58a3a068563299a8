"""The contract of a method's rule, on one weight and without a model: what ``fxsparse.testing.check_method`` runs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from fxsparse.choice_checks import checked_choice, checked_choices
from fxsparse.method import Choice, GlobalRule, Method, Probe, Signs, WeightView, from_dict
from fxsparse.observed import Observed, marginals
from fxsparse.pattern import Pattern
from fxsparse.rng import generator_for
from fxsparse.selection import check_positions, to_mask, to_positions


def check_method(method: Method, pattern: Pattern, shape: Sequence[int], nnz: int, updates: int = 50) -> None:
    """Run a method's first updates on one random weight that drifts, and check every choice it makes.

    `nnz` is the count at the end; a weight of `shape` has to fit `pattern`.  No optimizer takes part.
    """
    assert from_dict(method.to_dict()) == method, f"{method.name}: from_dict(to_dict()) is another method"
    assert method.source, f"{method.name}: source names no paper"
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(tuple(shape), generator=random)
    count = pattern.feasible(shape, method.nnz(-1, nnz, prod(shape)))
    mask = pattern.project(method.init(weight, generator_for(0, "w", -1)), count)
    extras = {e.name: e.start(weight, mask, generator_for(0, "w", -1)) for e in method.extras}
    if method.rule is None or method.schedule is None:
        assert method.rule is method.schedule is None, f"{method.name}: rule and schedule go together"
        return
    for index, step in enumerate(itertools.islice(method.schedule.updates(2**62), updates)):
        if method.reparam.exact_zeros:
            weight = weight * mask
        gradient = torch.randn(tuple(shape), generator=random)
        count = pattern.feasible(shape, method.nnz(step, nnz, prod(shape)))
        heights = (None, 1, 3) if index < 20 else (None,)
        view = [
            view_of(method, pattern, weight, mask, gradient, count, step, height, nnz, extras)
            for height in heights
        ]
        mask, changed = _checked_update(method, view, mask)
        extras |= changed
        weight = weight - 0.1 * gradient


def view_of(
    method: Method,
    pattern: Pattern,
    weight: Tensor,
    mask: Tensor,
    gradient: Tensor,
    nnz: int,
    step: int,
    tile_rows: int | None = None,
    budget: int | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> WeightView:
    """What a rule sees of a weight named "w" at seed 0; the dense gradient in tiles of `tile_rows` (all).

    Its marginals are those of the inputs `gradient` and one output gradient of 1 for each.
    `budget` is `nnz` unless it is given.
    """
    matrix = gradient.reshape(len(gradient), -1)
    height = tile_rows or len(matrix)

    def tiles() -> Iterator[tuple[int, Tensor]]:
        asked = method.rule is not None and method.rule.probe is Probe.DENSE
        assert asked, f"{method.name}: reads the dense gradient without asking for it"
        return ((first, matrix[first : first + height]) for first in range(0, len(matrix), height))

    def at(positions: Tensor) -> Tensor:
        asked = method.rule is not None and method.rule.probe in (Probe.SAMPLED, Probe.GUIDED)
        assert asked, f"{method.name}: reads sampled gradients without asking for them"
        check_positions(positions, gradient.numel(), method.name)
        return gradient.flatten()[positions]

    def sums(signs: Signs | None) -> tuple[Tensor, Tensor] | None:
        asked = method.rule is not None and method.rule.probe is Probe.GUIDED
        assert asked, f"{method.name}: reads marginals without asking for them"
        seen = Observed(matrix, torch.eye(len(matrix), dtype=matrix.dtype))
        return marginals([seen], matrix.shape, signs)

    return WeightView(
        name="w",
        shape=tuple(weight.shape),
        pattern=pattern,
        nnz=nnz,
        budget=nnz if budget is None else budget,
        step=step,
        drop_fraction=method.schedule.drop_fraction(step) if method.schedule else 0.0,
        active=to_positions(mask),
        values=weight[mask],
        weight=lambda: _whole(method, weight),
        gradient_tiles=tiles,
        gradient_at=at,
        marginals=sums,
        generator=generator_for(0, "w", step),
        ablates=method.never_ablate is not None,
        final=nnz if budget is None else budget,
        extras=dict(extras or {}),
        active_gradient=lambda: gradient[mask],
        momentum=lambda: _average(method, gradient),
    )


def _whole(method: Method, weight: Tensor) -> Tensor:
    assert not method.reparam.exact_zeros, f"{method.name}: reads the whole weight, yet has exact zeros"
    return weight


def _average(method: Method, gradient: Tensor) -> Tensor:
    asked = method.rule is not None and method.rule.probe is Probe.EMA_DENSE
    assert asked, f"{method.name}: reads the optimizer's momentum without asking for it"
    return gradient


def _checked_update(
    method: Method, views: Sequence[WeightView], mask: Tensor
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The mask after an update and new extras; `views` are of the same weight, in different tiles."""
    assert method.rule is not None
    first = views[0]
    where = f"{method.name} at step {first.step}"
    choice = checked_choice(method.rule(first), first, method)
    if isinstance(method.rule, GlobalRule):
        alone = replace(first, generator=generator_for(0, first.name, first.step))
        checked_choices(method.rule.choose_all([alone], first.nnz), [alone], method)
    new = _positions(choice)
    if method.learned_nnz:
        assert method.extras, f"{where}: learns its count, yet has nothing to learn it with"
    elif method.varying_nnz:
        assert len(new) <= first.budget, f"{where}: {len(new)} entries, the budget is {first.budget}"
    else:
        assert len(new) == first.nnz, f"{where}: {len(new)} entries, expected {first.nnz}"
    for view in views[1:]:
        again = _positions(checked_choice(method.rule(view), view, method))
        assert torch.equal(new, again), f"{where}: the choice depends on the gradient's tiles"
    moved = to_mask(new, mask.shape)
    first.pattern.check(moved)
    return moved, choice.extras


def _positions(choice: Choice) -> Tensor:
    return to_positions(choice.entries) if choice.entries.dtype == torch.bool else choice.entries
