"""Convolutions with one filter a channel against the convolution in fp64, on both implementations."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from fxsparse import testing
from fxsparse.errors import UnsupportedError
from fxsparse.kernel import Problem, registered, tolerance
from fxsparse.kernels import cpu
from fxsparse.kernels.csr.conv import window
from fxsparse.kernels.library import ACTIVATIONS, activate

KERNEL = registered()["cpu-depthwise"]
OPS = {1: F.conv1d, 2: F.conv2d}


def infer(x, weight, bias=None, run=KERNEL.run, **arguments):
    given = {
        "kernel_size": tuple(weight.shape[2:]),
        "in_channels": len(weight),
        "groups": len(weight),
        **arguments,
    }
    return run(x, bias, *KERNEL.pack(weight).values(), **given)


def check(x, weight, arguments, activation="relu6"):
    """The output with a bias and an activation, in memory that is NaN until written."""
    bias = 3 * torch.randn(len(weight)).to(x.dtype)
    op, given = OPS[weight.dim() - 2], {"groups": len(weight), **arguments}
    exact = activate(op(x.double(), weight.double(), bias.double(), **given), activation)
    scale = op(x.double().abs(), weight.double().abs(), bias.double().abs(), **given).max().item()
    for run in (KERNEL.run, KERNEL.reference):
        with testing.poisoned_memory():
            y = infer(x, weight, bias, run, activation=activation, **arguments)
        assert y.dtype == x.dtype
        assert y.is_contiguous()
        testing.assert_close(y, exact, tolerance(x.dtype, weight[0].numel() + 2), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("size", "kernel", "arguments"),
    [
        ((2, 6, 14, 14), (3, 3), {"padding": 1}),
        ((2, 6, 15, 11), (3, 3), {"stride": 2, "padding": 1}),
        ((1, 4, 13, 40), (3, 5), {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
        ((3, 5, 7, 7), (5, 5), {"padding": 2}),
        ((2, 6, 7, 7), (3, 3), {}),
        ((3, 3, 5, 6), (3, 3), {"padding": 4}),
        ((2, 2, 12, 10), (2, 2), {"stride": 4, "padding": 3}),
        ((1, 2, 140, 150), (3, 3), {"padding": 1}),
        ((2, 3, 9, 9), (1, 1), {"stride": 2}),
        ((2, 3, 50), (5,), {"padding": 2, "stride": 2}),
        ((2, 3, 9, 9), (2, 4), {"padding": "same", "dilation": (3, 1)}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # torch, of its own dense op
def test_equals_the_dense_convolution(size, kernel, arguments, dtype):
    check(torch.randn(size).to(dtype), torch.randn(size[1], 1, *kernel).to(dtype), arguments)


@pytest.mark.parametrize("level", cpu.build.INSTRUCTION_SETS[:-1])
def test_equals_it_at_random_shapes_on_every_instruction_set(level):
    if cpu.availability() is not None:
        pytest.skip("no C++ kernels here")
    before = cpu.instruction_set()
    if cpu.instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    draw = random.Random(0)
    for _ in range(60):
        arguments = {
            "stride": (draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3])),
            "dilation": (draw.choice([1, 2]), draw.choice([1, 3])),
            "padding": draw.choice([0, (1, 2), (2, 0), 3]),
        }
        weight = torch.randn(draw.choice([1, 5, 40]), 1, draw.choice([1, 2, 3, 5]), draw.choice([1, 3, 4]))
        x = torch.randn(draw.choice([1, 3]), len(weight), draw.randint(9, 20), draw.randint(10, 70))
        check(x, weight, arguments, draw.choice(ACTIVATIONS))
    cpu.instruction_set(before)


def test_one_sample_no_sample_and_other_memory_formats():
    weight, x = torch.randn(4, 1, 3, 3), torch.randn(3, 4, 8, 7)
    whole = infer(x, weight)
    assert torch.equal(infer(x[1], weight), whole[1])
    assert infer(x[:0], weight).shape == (0, 4, 6, 5)
    assert torch.equal(infer(x.to(memory_format=torch.channels_last), weight), whole)
    wide = torch.randn(3, 4, 8, 14)[..., ::2]
    assert torch.equal(infer(wide, weight), infer(wide.contiguous(), weight))


def test_padding_reads_nothing_past_the_input():
    weight, inner = torch.ones(3, 1, 3, 3), torch.full((3 * 5 * 6 + 64,), torch.nan)
    x = inner[32:-32].view(1, 3, 5, 6)
    x.fill_(1.0)
    for stride in (1, 2):
        expected = F.conv2d(x, weight, None, stride, 1, 1, 3)
        assert torch.equal(infer(x, weight, padding=1, stride=stride), expected)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_what_is_not_finite_passes_as_in_torch(activation):
    weight, x = torch.ones(1, 1, 1, 1), torch.tensor([torch.nan, torch.inf, -torch.inf, 7.0]).view(1, 1, 2, 2)
    y = infer(x, weight, activation=activation)
    torch.testing.assert_close(y, activate(x, activation), equal_nan=True)


def test_threads_do_not_change_a_bit():
    before, results = torch.get_num_threads(), []
    weight, x = torch.randn(40, 1, 3, 3), torch.randn(2, 40, 30, 30)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(infer(x, weight, padding=1))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_passes_opcheck(dtype):
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((2, 4, 8, 7), (4, 1, 3, 3), (4,)))
    numbers = window((3, 3), 4, 2, 1, groups=4)
    for given in (bias, None):
        opcheck(torch.ops.fxsparse.depthwise_conv.default, (x, weight, given, 5, numbers))


def test_counted_flops_are_two_per_tap_and_pixel():
    with FlopCounterMode(display=False) as counter:
        infer(torch.randn(2, 6, 8, 7), torch.randn(6, 1, 3, 3), padding=1, stride=2)
    assert counter.get_total_flops() == 2 * 9 * 6 * 2 * 4 * 4
    problem = Problem("conv2d", (6, 1, 3, 3), 32, 50, torch.float32, torch.device("cpu"), False)
    assert KERNEL.cost(problem).flops == counter.get_total_flops()
    assert KERNEL.cost(problem).bytes == 6 * 9 * 4


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_the_same_numbers(backend):
    weight, x = torch.randn(4, 1, 3), torch.randn(2, 4, 9)
    compiled = torch.compile(lambda x: 2 * infer(x, weight, padding=1), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), 2 * infer(x, weight, padding=1))


@pytest.mark.parametrize("size", [(9,), (9, 8)])
def test_a_compiler_sees_the_convolution_of_pytorch(size):
    weight, x, seen = torch.randn(4, 1, *[3] * len(size)), torch.randn(2, 4, *size), []

    def backend(gm, _):
        seen.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    compiled = torch.compile(lambda x: infer(x, weight, padding=1, activation="relu"), backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), infer(x, weight, padding=1, activation="relu"))
    assert any(f"conv{len(size)}d" in target for target in seen)
    assert not any("fxsparse" in target for target in seen)


def test_autocast_computes_in_bfloat16():
    weight, x = torch.randn(4, 1, 3, 3), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = infer(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), infer(x, weight), rtol=0.02, atol=0.05)


def test_refusals_say_why():
    arguments = (("kernel_size", (3, 3)), ("groups", 6))
    problem = Problem(
        "conv2d", (6, 1, 3, 3), 9, 20, torch.float32, torch.device("cpu"), False, arguments=arguments
    )
    assert KERNEL.refuses(problem) == cpu.refuses(problem)
    assert KERNEL.refuses(replace(problem, training=True))[-1] == "it has no gradient"
    for other in (
        replace(problem, shape=(6, 2, 3, 3)),
        replace(problem, shape=(12, 1, 3, 3)),
        replace(problem, arguments=()),
    ):
        assert KERNEL.refuses(other)[-1] == "it has one filter for each channel"


def test_what_does_not_fit_is_refused():
    weight = torch.randn(4, 1, 3, 3)
    with pytest.raises(ValueError, match="larger than the padded input"):
        infer(torch.randn(1, 4, 2, 2), weight)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        infer(torch.randn(1, 4, 5, 5, requires_grad=True), weight)
    if cpu.availability() is not None:
        pytest.skip("the reference checks by its views")
    with pytest.raises(RuntimeError, match="as many groups as channels"):
        infer(torch.randn(1, 8, 5, 5), weight, in_channels=8)
    with pytest.raises(RuntimeError, match=r"expected bias \[4\]"):
        infer(torch.randn(1, 4, 5, 5), weight, torch.randn(5))


def test_a_compiled_model_measures_it_for_filters_without_zeros():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU6()).eval()
    fast = fxsparse.compile(model, mode="infer", example_inputs=torch.randn(1, 32, 40, 40))
    (row,) = fast.report.layers
    assert row["dense_us"] > 0
    assert row["sparse_us"] > 0
    assert row["kernel"] in ("cpu-depthwise", "dense-conv")
