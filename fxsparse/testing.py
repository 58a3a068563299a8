"""Contracts that every pattern and method has to keep; for the tests of this project and of third parties.

Each check raises AssertionError with what was broken.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod

import torch
from torch import Tensor

from fxsparse.method import Method, Probe, WeightView, from_dict
from fxsparse.pattern import Pattern
from fxsparse.rng import generator_for
from fxsparse.selection import check_positions, to_mask, to_positions


def check_pattern(pattern: Pattern, shape: Sequence[int], nnz: int, seed: int = 0) -> None:
    """Project, prune, regrow and stream scores of `shape` (one the pattern fits), random and tied ones."""
    generator = torch.Generator().manual_seed(seed)
    total = pattern.feasible(shape, nnz)
    assert pattern.feasible(shape, total) == total, f"{pattern}: feasible({total}) is not {total} itself"
    random = torch.rand(tuple(shape), generator=generator)
    coarse = torch.randint(0, 3, tuple(shape), generator=generator).float()
    for score in (random, coarse, torch.zeros(tuple(shape))):
        mask = pattern.project(score, nnz)
        assert mask.dtype == torch.bool, f"{pattern}: project gave {mask.dtype}"
        assert mask.shape == score.shape, f"{pattern}: project gave shape {list(mask.shape)}"
        assert int(mask.sum()) == total, (
            f"{pattern}: project gave {int(mask.sum())} ones, feasible says {total}"
        )
        pattern.check(mask)
        assert torch.equal(pattern.project(score, nnz), mask), f"{pattern}: project is not deterministic"
        _check_prune_and_regrow(pattern, score, mask, nnz)
        _check_tiles(pattern, score, mask, nnz)


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
    if method.rule is None or method.schedule is None:
        assert method.rule is method.schedule is None, f"{method.name}: rule and schedule go together"
        return
    for index, step in enumerate(islice(method.schedule.updates(2**62), updates)):
        if method.reparam.exact_zeros:
            weight = weight * mask
        gradient = torch.randn(tuple(shape), generator=random)
        count = pattern.feasible(shape, method.nnz(step, nnz, prod(shape)))
        heights = (None, 1, 3) if index < 20 else (None,)
        view = [view_of(method, pattern, weight, mask, gradient, count, step, height) for height in heights]
        mask = _checked_update(method, view, mask)
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
) -> WeightView:
    """What a rule sees of a weight named "w" at seed 0; the dense gradient in tiles of `tile_rows` (all)."""
    matrix = gradient.reshape(len(gradient), -1)
    height = tile_rows or len(matrix)

    def tiles() -> Iterator[tuple[int, Tensor]]:
        asked = method.rule is not None and method.rule.probe is Probe.DENSE
        assert asked, f"{method.name}: reads the dense gradient without asking for it"
        return ((first, matrix[first : first + height]) for first in range(0, len(matrix), height))

    def whole() -> Tensor:
        assert not method.reparam.exact_zeros, f"{method.name}: reads the whole weight, yet has exact zeros"
        return weight

    return WeightView(
        name="w",
        shape=tuple(weight.shape),
        pattern=pattern,
        nnz=nnz,
        step=step,
        drop_fraction=method.schedule.drop_fraction(step) if method.schedule else 0.0,
        active=to_positions(mask),
        values=weight[mask],
        weight=whole,
        gradient_tiles=tiles,
        generator=generator_for(0, "w", step),
    )


def _checked_update(method: Method, views: Sequence[WeightView], mask: Tensor) -> Tensor:
    """The mask after an update; `views` are of the same weight, in different tiles."""
    assert method.rule is not None
    first = views[0]
    where = f"{method.name} at step {first.step}"
    new = method.rule(first)
    check_positions(new, mask.numel(), where)
    assert len(new) == first.nnz, f"{where}: {len(new)} entries, expected {first.nnz}"
    for view in views[1:]:
        assert torch.equal(new, method.rule(view)), f"{where}: the choice depends on the gradient's tiles"
    moved = to_mask(new, mask.shape)
    first.pattern.check(moved)
    return moved


def _check_prune_and_regrow(pattern: Pattern, score: Tensor, mask: Tensor, nnz: int) -> None:
    active = int(mask.sum())
    for keep in {0, active // 3, active - 1 if active else 0, active}:
        kept = pattern.prune(score.masked_fill(~mask, -torch.inf), keep)
        assert int(kept.sum()) <= keep, (
            f"{pattern}: prune kept {int(kept.sum())}, at most {keep} were allowed"
        )
        assert not bool((kept & ~mask).any()), f"{pattern}: prune kept an entry with score -inf"
        regrown = pattern.project((1 - score).masked_fill(kept, torch.inf), nnz)
        assert bool((regrown | ~kept).all()), f"{pattern}: project dropped an entry with score +inf"
        assert int(regrown.sum()) == active, f"{pattern}: pruning and growing changed the count"
        pattern.check(regrown)
        if pattern.streams:
            short = pattern.prune(score[mask], keep)
            assert torch.equal(kept[mask], short), f"{pattern}: prune differs on the active entries alone"


def _check_tiles(pattern: Pattern, score: Tensor, mask: Tensor, nnz: int) -> None:
    matrix = score.reshape(len(score), -1)
    for height in (1, 3, len(score)):
        tiles = [(first, matrix[first : first + height]) for first in range(0, len(score), height)]
        positions = pattern.project_tiles(tiles, score.shape, nnz)
        assert torch.equal(positions, to_positions(mask)), (
            f"{pattern}: tiles of {height} rows give another mask"
        )
