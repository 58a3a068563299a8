"""Contracts that every pattern and method has to keep; for the tests of this project and of third parties.

Each check raises AssertionError with what was broken.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.pattern import Pattern
from fxsparse.selection import to_positions


def check_pattern(pattern: Pattern, shape: Sequence[int], nnz: int, seed: int = 0) -> None:
    """Project, prune, regrow and stream scores of `shape` (one the pattern fits), random and tied ones."""
    generator = torch.Generator().manual_seed(seed)
    total = pattern.feasible(shape, nnz)
    assert pattern.feasible(shape, total) == total, f"{pattern}: feasible({total}) is not {total} itself"
    random = torch.rand(tuple(shape), generator=generator)
    coarse = torch.randint(0, 3, tuple(shape), generator=generator).float()
    for score in (random, coarse, torch.zeros(tuple(shape))):
        mask = pattern.project(score, nnz)
        assert mask.dtype == torch.bool and mask.shape == score.shape, f"{pattern}: project gave {mask.dtype}"
        assert int(mask.sum()) == total, (
            f"{pattern}: project gave {int(mask.sum())} ones, feasible says {total}"
        )
        pattern.check(mask)
        assert torch.equal(pattern.project(score, nnz), mask), f"{pattern}: project is not deterministic"
        _check_prune_and_regrow(pattern, score, mask, nnz)
        _check_tiles(pattern, score, mask, nnz)


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
