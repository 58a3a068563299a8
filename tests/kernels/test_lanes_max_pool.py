"""Max pooling of images in lanes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fxsparse.errors import UnsupportedError
from fxsparse.kernels import cpu, from_lanes, max_pool_lanes, to_lanes
from fxsparse.kernels.lanes.max_pool import reference


@pytest.mark.parametrize("level", cpu.build.INSTRUCTION_SETS[:-1])
@pytest.mark.parametrize(
    ("samples", "grid", "size", "arguments"),
    [
        (1, 4, (56, 24), {"kernel_size": 3, "stride": 2, "padding": 1}),
        (4, 2, (12, 20), {"kernel_size": 2}),
        (16, 1, (9, 13), {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 0), "ceil_mode": True}),
        (16, 1, (9, 13), {"kernel_size": 3, "stride": 1, "dilation": (1, 2)}),
    ],
    ids=str,
)
def test_it_is_torchs_pooling(samples, grid, size, arguments, level):
    before = cpu.instruction_set()
    if cpu.availability() is None:
        cpu.instruction_set(level)
    x = torch.randn(samples, 3, *size)
    x[0, 0, 0, 0], x[0, 1, 2, 2] = math.nan, -math.inf
    y = from_lanes(max_pool_lanes(to_lanes(x, grid), **arguments, grid=grid), grid)
    torch.testing.assert_close(y, F.max_pool2d(x, **arguments), rtol=0, atol=0, equal_nan=True)
    if cpu.availability() is None:
        cpu.instruction_set(before)


def test_the_reference_is_the_same_and_the_fake_fits():
    x, window = to_lanes(torch.randn(4, 3, 8, 12), 2), [3, 3, 2, 2, 1, 1, 1, 1, 4, 6]
    assert torch.equal(reference(x, window, 2), torch.ops.fxsparse.max_pool_lanes(x, window, 2))
    opcheck(torch.ops.fxsparse.max_pool_lanes.default, (x, window, 2))


def test_an_output_that_is_no_whole_parts_and_gradients_are_refused():
    x = to_lanes(torch.randn(4, 3, 8, 12), 2)
    if cpu.load():
        with pytest.raises(RuntimeError, match="parts, got"):
            max_pool_lanes(x, 3, 1, grid=2)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        max_pool_lanes(x.requires_grad_(), 2, grid=2)
