"""Images whose last dimension is 16 lanes: samples, or the parts of a grid that every sample is cut into.

A vector of 16 then is one pixel of every lane: no vector is cut by the end of a row or by the shift of a tap, whatever
the size of a plane.  With a grid of 4, 2 or 1 parts along each side the lanes are 1, 4 or 16 samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.kernel import register_glue
from fxsparse.kernels.library import define

LANES = 16
GRIDS = (4, 2, 1)
"""Parts along each side of a sample."""


def samples_of(grid: int) -> int:
    """How many samples a unit of 16 lanes has."""
    return LANES // (grid * grid)


@register_glue
def to_lanes(x: Tensor, grid: int) -> Tensor:
    """X [samples, channels, height, width] as [units, channels, height / grid, width / grid, 16], fp32.

    Raises:
        RuntimeError: samples that do not fill units, or a size that `grid` does not divide.
    """
    return torch.ops.fxsparse.to_lanes.default(x, grid)


@register_glue
def from_lanes(x: Tensor, grid: int) -> Tensor:
    """The images that `to_lanes` was given."""
    return torch.ops.fxsparse.from_lanes.default(x, grid)


@register_glue
def join_lanes(units: Sequence[Tensor], fine: int, coarse: int) -> Tensor:
    """``to_lanes(from_lanes(torch.cat(units), fine), coarse)``, for a grid coarser than the one they have.

    Raises:
        RuntimeError: units of different sizes, or too few for the coarser grid.
    """
    return torch.ops.fxsparse.join_lanes.default(units, fine, coarse)


def reference_to_lanes(x: Tensor, grid: int) -> Tensor:
    """`to_lanes` in plain PyTorch."""
    _check(x, grid)
    samples, channels, height, width = x.shape
    parts = x.reshape(
        samples // samples_of(grid), samples_of(grid), channels, grid, height // grid, grid, width // grid
    )
    return parts.permute(0, 2, 4, 6, 1, 3, 5).flatten(4).clone(memory_format=torch.contiguous_format)


def reference_from_lanes(x: Tensor, grid: int) -> Tensor:
    """`from_lanes` in plain PyTorch."""
    units, channels, height, width, _ = x.shape
    parts = x.reshape(units, channels, height, width, samples_of(grid), grid, grid)
    images = parts.permute(0, 4, 1, 5, 2, 6, 3)
    return images.reshape(units * samples_of(grid), channels, grid * height, grid * width)


def reference_join_lanes(units: Sequence[Tensor], fine: int, coarse: int) -> Tensor:
    """`join_lanes` in plain PyTorch."""
    return reference_to_lanes(reference_from_lanes(torch.cat(list(units)), fine), coarse)


def _check(x: Tensor, grid: int) -> None:
    if (
        x.dim() != 4
        or grid not in GRIDS
        or len(x) % samples_of(grid)
        or x.shape[2] % grid
        or x.shape[3] % grid
    ):
        raise RuntimeError(
            f"fxsparse: expected images in float32 that fill 16 lanes with {grid} x {grid} parts, got {list(x.shape)}"
        )


def _fake_to_lanes(x: Tensor, grid: int) -> Tensor:
    _check(x, grid)
    return x.new_empty(len(x) // samples_of(grid), x.shape[1], x.shape[2] // grid, x.shape[3] // grid, LANES)


def _fake_from_lanes(x: Tensor, grid: int) -> Tensor:
    return x.new_empty(len(x) * samples_of(grid), x.shape[1], grid * x.shape[2], grid * x.shape[3])


def _fake_join_lanes(units: Sequence[Tensor], fine: int, coarse: int) -> Tensor:
    ratio, first = fine // coarse, units[0]
    count = sum(len(unit) for unit in units) // ratio**2
    return first.new_empty(count, first.shape[1], first.shape[2] * ratio, first.shape[3] * ratio, LANES)


define("to_lanes(Tensor x, int grid) -> Tensor", reference_to_lanes, _fake_to_lanes)
define("from_lanes(Tensor x, int grid) -> Tensor", reference_from_lanes, _fake_from_lanes)
define("join_lanes(Tensor[] units, int fine, int coarse) -> Tensor", reference_join_lanes, _fake_join_lanes)
