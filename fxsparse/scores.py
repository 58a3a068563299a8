"""Scores by which an initial mask is chosen, by name."""

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Score
from fxsparse.pattern import row_tiles


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), fp32: every mask of the pattern is as likely as any other."""
    tiles = [tile for _, tile in random_tiles(weight.shape, generator, weight.device)]
    return torch.cat(tiles).view(weight.shape)


def magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The absolute value."""
    del generator
    return weight.detach().abs()


def random_tiles(
    shape: Sequence[int], generator: torch.Generator, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """`random` in row tiles (first row, [rows, fan_in]) for storage that never holds a whole weight.

    The numbers are drawn on the generator's device, and the tiling depends on `shape` alone.
    """
    for first, rows in row_tiles(shape):
        tile = torch.rand(rows, prod(shape[1:]), generator=generator, device=generator.device)
        yield first, tile.to(device)


SCORES: dict[str, Score] = {"random": random, "magnitude": magnitude}


def score_named(name: str) -> Score:
    """The score registered in `SCORES`; PlanError for another name."""
    if name not in SCORES:
        raise PlanError(f"expected a score among {', '.join(sorted(SCORES))}, got {name!r}.")
    return SCORES[name]
