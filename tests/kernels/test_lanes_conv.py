"""Convolutions of images in lanes against the dense convolution in fp64, on both implementations."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import testing
from fxsparse.errors import UnsupportedError
from fxsparse.formats import column_blocks
from fxsparse.kernel import tolerance
from fxsparse.kernels import conv_lanes, cpu, csr_conv_lanes, from_lanes, to_lanes
from fxsparse.kernels.csr.conv import window
from fxsparse.kernels.lanes import conv
from fxsparse.kernels.lanes.layout import samples_of
from fxsparse.kernels.library import activate


def sparse_weight(shape, density):
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    weight[0] = 0
    return weight


def check(x, weight, arguments, grid, activation="relu", with_residual=True, widest=None):
    """Both ops, with bias, residual and activation, in memory that is NaN until written."""
    bias = torch.randn(len(weight))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), **arguments)
    scale = F.conv2d(x.double().abs(), weight.double().abs(), bias.double().abs(), **arguments).max().item()
    residual = torch.randn(exact.shape) if with_residual else None
    if residual is not None:
        exact, scale = exact + residual.double(), scale + residual.abs().max().item()
    exact = activate(exact, activation)
    given = {"kernel_size": tuple(weight.shape[2:]), "in_channels": x.shape[1], **arguments}
    added = None if residual is None else to_lanes(residual, grid)
    packed = conv.pack_lanes(weight.flatten(1), **given)
    if widest is not None:
        blocks = column_blocks.from_dense(weight.flatten(1), widest)
        packed = {"values": blocks.values, "start": blocks.start, "columns": blocks.columns}
    for run, buffers in ((csr_conv_lanes, packed.values()), (conv_lanes, [weight])):
        with testing.poisoned_memory():
            y = run(to_lanes(x, grid), bias, *buffers, activation, added, grid=grid, **given)
        testing.assert_close(from_lanes(y, grid), exact, tolerance(x.dtype, weight[0].numel() + 2), scale)
        if run is csr_conv_lanes and added is not None:
            over = added.clone()
            options = {"grid": grid, "over_residual": True, **given}
            assert run(to_lanes(x, grid), bias, *buffers, activation, over, **options) is over
            assert torch.equal(over, y)


@pytest.mark.parametrize(
    ("samples", "grid", "size", "shape", "arguments"),
    [
        (2, 4, (28, 36), (9, 5, 3, 3), {"padding": 1}),
        (1, 4, (32, 40), (6, 4, 3, 3), {"stride": 2, "padding": 1}),
        (4, 2, (14, 18), (7, 3, 1, 1), {}),
        (4, 2, (12, 20), (7, 3, 1, 1), {"stride": 2}),
        (1, 4, (56, 56), (5, 3, 7, 7), {"stride": 2, "padding": 3}),
        (4, 2, (4, 6), (3, 2, 5, 5), {"padding": 2}),
        (8, 2, (10, 10), (6, 1, 3, 3), {"padding": 1, "groups": 6}),
        (16, 1, (7, 7), (600, 20, 1, 1), {}),
        (16, 1, (9, 9), (600, 20, 1, 1), {"stride": 2}),
        (
            16,
            1,
            (11, 23),
            (6, 2, 3, 2),
            {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 2), "groups": 2},
        ),
        (16, 1, (3, 1), (4, 3, 1, 1), {"padding": 2}),
        (16, 1, (5, 5), (4, 3, 3, 3), {"padding": "same", "dilation": 2}),
    ],
    ids=str,
)
def test_equals_the_dense_convolution(samples, grid, size, shape, arguments):
    for density in (0.0, 0.3, 1.0):
        x = torch.randn(samples, shape[1] * arguments.get("groups", 1), *size)
        check(x, sparse_weight(shape, density), arguments, grid)


@pytest.mark.parametrize("level", cpu.build.INSTRUCTION_SETS[:-1])
def test_equals_it_at_random_shapes_on_every_instruction_set(level):
    if cpu.availability() is not None:
        pytest.skip("no C++ kernels here")
    before = cpu.instruction_set()
    if cpu.instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    draw = random.Random(0)
    for _ in range(40):
        grid, stride, groups = draw.choice([1, 2, 4]), draw.choice([1, 2]), draw.choice([1, 1, 2])
        kernel = draw.choice([1, 3, 5]), draw.choice([1, 3, 7])
        shape = (groups * draw.choice([1, 5, 17]), draw.choice([1, 3, 40]), *kernel)
        size = [grid * stride * draw.randint(2, 9), grid * stride * draw.randint(2, 21)]
        arguments = {"stride": stride, "padding": (kernel[0] // 2, kernel[1] // 2), "groups": groups}
        x = torch.randn(draw.choice([1, 2]) * samples_of(grid), shape[1] * groups, *size)
        activation = draw.choice(["none", "relu", "relu6", "silu"])
        widest = draw.choice([None, 5, 2304])
        check(x, sparse_weight(shape, 0.3), arguments, grid, activation, draw.random() < 0.5, widest)
    cpu.instruction_set(before)


def test_two_threads_give_the_same():
    weight, x = sparse_weight((64, 32, 3, 3), 0.2), torch.randn(4, 32, 28, 28)
    torch.set_num_threads(2)
    try:
        check(x, weight, {"padding": 1}, 2)
    finally:
        torch.set_num_threads(1)


def test_the_references_are_the_same_and_fakes_and_flops_fit():
    weight, x = sparse_weight((6, 4, 3, 3), 0.5), to_lanes(torch.randn(4, 4, 16, 12), 2)
    given = {"kernel_size": (3, 3), "in_channels": 4, "stride": 2, "padding": 1}
    packed = tuple(conv.pack_lanes(weight.flatten(1), **given).values())
    numbers, bias = window(**given), torch.randn(6)
    sparse = (x, *packed, bias, None, 1, numbers, 2)
    dense = (x, weight, bias, None, 1, numbers, 2)
    torch.testing.assert_close(conv.reference(*sparse), torch.ops.fxsparse.csr_conv_lanes(*sparse))
    torch.testing.assert_close(conv.reference_dense(*dense), torch.ops.fxsparse.conv_lanes(*dense))
    opcheck(torch.ops.fxsparse.csr_conv_lanes.default, sparse)
    opcheck(torch.ops.fxsparse.conv_lanes.default, dense)
    over = (*sparse[:5], torch.ones_like(torch.ops.fxsparse.csr_conv_lanes(*sparse)), *sparse[6:])
    opcheck(torch.ops.fxsparse.csr_conv_lanes_over.default, over)
    written = over[5].clone()
    conv.reference_over(*over[:5], written, *over[6:])
    with FlopCounterMode(display=False) as counter:
        torch.ops.fxsparse.csr_conv_lanes(*sparse)
        torch.ops.fxsparse.csr_conv_lanes_over(*over)
        torch.ops.fxsparse.conv_lanes(*dense)
    assert counter.get_total_flops() == 2 * (2 * len(packed[0]) + weight.numel()) * 4 * 8 * 6
    torch.testing.assert_close(over[5], written)


def test_a_result_is_written_over_nothing_but_a_residual_of_its_own():
    weight, x = torch.ones(4, 4, 1, 1), to_lanes(torch.randn(16, 4, 5, 5), 1)
    packed = conv.pack_lanes(weight.flatten(1), kernel_size=(1, 1), in_channels=4).values()
    given = {"grid": 1, "over_residual": True, "kernel_size": (1, 1), "in_channels": 4}
    for wrong in (x, x.clone().transpose(2, 3)):
        with pytest.raises(
            RuntimeError, match="contiguous residual to write over that shares no memory with x"
        ):
            csr_conv_lanes(x, None, *packed, residual=wrong, **given)
    both = torch.randn(x.numel() + 64)
    with pytest.raises(RuntimeError, match="residual to write over that shares no memory with x"):
        csr_conv_lanes(both[:-64].view_as(x), None, *packed, residual=both[64:].view_as(x), **given)
    with pytest.raises(RuntimeError, match="expected a residual of the output's shape"):
        csr_conv_lanes(x, None, *packed, residual=x[:, :3].clone(), **given)
    with pytest.raises(RuntimeError, match="expected a residual to write over, got None"):
        csr_conv_lanes(x, None, *packed, **given)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        csr_conv_lanes(x, None, *packed, residual=x.clone().requires_grad_().exp(), **given)
    for run in (conv.reference_over, conv._fake_over):
        with pytest.raises(
            RuntimeError, match=r"contiguous residual \[1, 4, 5, 5, 16\] in float32 to write over"
        ):
            run(x, *packed, None, x.double(), 0, window((1, 1), 4), 1)
    nothing = csr_conv_lanes(x[:0], None, *packed, residual=x[:0].clone(), **given)
    assert nothing.shape == (0, *x.shape[1:])


def test_an_output_that_is_no_whole_parts_is_refused():
    weight, x = torch.randn(3, 2, 3, 3), to_lanes(torch.randn(4, 2, 8, 8), 2)
    for run in (torch.ops.fxsparse.conv_lanes.default, conv.reference_dense):
        numbers = window((3, 3), 2)
        with pytest.raises(RuntimeError, match="parts, got"):
            run(x, weight, None, None, 0, numbers, 2)


def test_wrong_weights_and_gradients_are_refused():
    x = to_lanes(torch.randn(4, 2, 8, 8), 2)
    given = {"grid": 2, "kernel_size": (1, 1), "in_channels": 2}
    if cpu.load():
        with pytest.raises(RuntimeError, match="expected a weight of 2 columns"):
            conv_lanes(x, None, torch.randn(3, 5, 1, 1), **given)
        values, start, columns = conv.pack_lanes(torch.ones(3, 2), kernel_size=(1, 1), in_channels=2).values()
        with pytest.raises(RuntimeError, match="entry in column 7 of 2"):
            csr_conv_lanes(x, None, values, start, torch.full_like(columns, 7), **given)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        conv_lanes(x.requires_grad_(), None, torch.randn(3, 2, 1, 1), **given)


def test_panels_of_blocks_stay_small():
    assert conv.width(window((1, 1), 64)) == 128
    assert conv.width(window((3, 3), 64, padding=1)) == 25 * 9
    assert conv.width(window((3, 3), 64, stride=2)) == 18 * 9
    assert conv.width(window((31, 31), 64)) == 31 * 31
