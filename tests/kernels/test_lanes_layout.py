"""Samples, and parts of them, in lanes."""

import pytest
import torch
from torch.library import opcheck

from fxsparse.kernels import cpu, from_lanes, join_lanes, to_lanes
from fxsparse.kernels.lanes.layout import (
    reference_from_lanes,
    reference_join_lanes,
    reference_to_lanes,
    samples_of,
)


@pytest.mark.parametrize("level", cpu.build.INSTRUCTION_SETS[:-1])
@pytest.mark.parametrize(
    ("samples", "grid", "size"), [(32, 1, (7, 7)), (4, 2, (14, 36)), (3, 4, (28, 68)), (1, 4, (4, 4))]
)
def test_there_and_back(samples, grid, size, level):
    before = cpu.instruction_set()
    if cpu.availability() is None:
        cpu.instruction_set(level)
    x = torch.randn(samples, 3, *size)
    lanes = to_lanes(x, grid)
    assert lanes.shape == (samples // samples_of(grid), 3, size[0] // grid, size[1] // grid, 16)
    assert torch.equal(lanes, reference_to_lanes(x, grid))
    assert torch.equal(from_lanes(lanes, grid), x)
    assert torch.equal(reference_from_lanes(lanes, grid), x)
    if cpu.availability() is None:
        cpu.instruction_set(before)


def test_lanes_are_samples_then_rows_then_columns_of_parts():
    x = torch.arange(4 * 2 * 2, dtype=torch.float32).view(4, 1, 2, 2)
    assert to_lanes(x, 2).flatten().tolist() == list(range(16))


def test_any_memory_format_comes_in():
    x = torch.randn(16, 4, 6, 6)
    assert torch.equal(to_lanes(x.contiguous(memory_format=torch.channels_last), 1), to_lanes(x, 1))


@pytest.mark.parametrize(
    ("shape", "grid"), [((3, 1, 8, 8), 2), ((4, 1, 7, 8), 2), ((16, 8, 8), 1), ((16, 1, 8, 8), 3)]
)
def test_what_does_not_fill_lanes_is_refused(shape, grid):
    for run in (to_lanes, reference_to_lanes):
        with pytest.raises(RuntimeError, match="that fill 16 lanes"):
            run(torch.randn(shape), grid)


@pytest.mark.parametrize("level", cpu.build.INSTRUCTION_SETS[:-1])
@pytest.mark.parametrize(
    ("samples", "grids", "size", "cut"),
    [(8, (4, 2), (28, 36), 1), (32, (2, 1), (14, 10), 2), (16, (4, 1), (8, 12), 3)],
)
def test_units_of_a_finer_grid_are_joined(samples, grids, size, cut, level):
    before = cpu.instruction_set()
    if cpu.availability() is None:
        cpu.instruction_set(level)
    x = torch.randn(samples, 3, *size)
    units = to_lanes(x, grids[0]).split(cut)
    assert torch.equal(join_lanes(units, *grids), to_lanes(x, grids[1]))
    assert torch.equal(reference_join_lanes(units, *grids), to_lanes(x, grids[1]))
    if cpu.availability() is None:
        cpu.instruction_set(before)


@pytest.mark.parametrize(
    ("units", "grids", "message"),
    [
        ([(4, 3, 7, 7, 16), (4, 3, 7, 8, 16)], (4, 2), "images of one size"),
        ([(3, 3, 7, 7, 16)], (4, 2), "a multiple of 4 units, got 3"),
        ([(4, 3, 7, 7, 16)], (2, 4), "a grid coarser than 2"),
    ],
)
@pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
def test_units_that_do_not_fit_together_are_refused(units, grids, message):
    with pytest.raises(RuntimeError, match=message):
        join_lanes([torch.randn(shape) for shape in units], *grids)


def test_fakes_fit():
    opcheck(torch.ops.fxsparse.join_lanes.default, ([torch.randn(4, 3, 4, 8, 16)], 4, 2))
    opcheck(torch.ops.fxsparse.to_lanes.default, (torch.randn(4, 3, 4, 8), 2))
    opcheck(torch.ops.fxsparse.from_lanes.default, (torch.randn(2, 3, 4, 8, 16), 2))
