"""Sparse convolutions for inference against the dense convolution in fp64, on both implementations."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import testing
from fxsparse.errors import UnsupportedError
from fxsparse.kernel import Problem, registered, tolerance
from fxsparse.kernels import cpu
from fxsparse.kernels.csr.conv import window
from fxsparse.kernels.library import activate

KERNEL = registered()["cpu-csr-conv"]
OPS = {1: F.conv1d, 2: F.conv2d}


def weight_of(shape, density=0.3, dtype=torch.float32):
    """A weight with zeros, its first row empty below density 1."""
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    if density < 1:
        weight[0] = 0
    return weight.to(dtype)


def infer(x, weight, bias=None, run=KERNEL.run, **arguments):
    given = {"in_channels": weight.shape[1] * arguments.get("groups", 1), **arguments}
    return run(x, bias, *KERNEL.pack(weight).values(), kernel_size=tuple(weight.shape[2:]), **given)


def check(x, weight, arguments, with_residual=True, activation="relu"):
    """The output with bias, residual and activation, in memory that is NaN until written."""
    bias = torch.randn(len(weight)).to(x.dtype)
    op = OPS[weight.dim() - 2]
    exact = op(x.double(), weight.double(), bias.double(), **arguments)
    residual = torch.randn(exact.shape).to(x.dtype) if with_residual else None
    scale = op(x.double().abs(), weight.double().abs(), bias.double().abs(), **arguments).max().item()
    if residual is not None:
        exact, scale = exact + residual.double(), scale + residual.abs().max().item()
    exact = activate(exact, activation)
    for run in (KERNEL.run, KERNEL.reference):
        with testing.poisoned_memory():
            y = infer(x, weight, bias, run, activation=activation, residual=residual, **arguments)
        assert y.dtype == x.dtype
        assert y.is_contiguous()
        testing.assert_close(y, exact, tolerance(x.dtype, weight[0].numel() + 2), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("size", "shape", "arguments"),
    [
        ((3, 64, 8, 8), (9, 64, 1, 1), {}),
        ((2, 6, 15, 11), (6, 6, 3, 3), {"stride": 2, "padding": 1}),
        ((1, 4, 13, 40), (5, 4, 3, 5), {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
        ((2, 6, 7, 7), (8, 6, 3, 3), {"padding": 1}),
        ((2, 6, 7, 7), (8, 6, 3, 3), {}),
        ((3, 3, 5, 6), (4, 3, 3, 3), {"padding": 4}),
        ((2, 6, 8, 12), (6, 2, 3, 3), {"groups": 3, "padding": 2, "stride": 2}),
        ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4, "padding": "valid"}),
        ((2, 2, 12, 10), (3, 2, 2, 2), {"stride": 4, "padding": 3}),
        ((2, 3, 50), (7, 3, 5), {"padding": 2, "stride": 2}),
    ],
    ids=str,
)
def test_equals_the_dense_convolution(size, shape, arguments, dtype):
    for density in (0.0, 0.3, 1.0):
        check(torch.randn(size).to(dtype), weight_of(shape, density, dtype), arguments)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # torch, of its own dense op
def test_same_padding_may_be_uneven():
    check(torch.randn(2, 2, 9, 9), weight_of((4, 2, 2, 4)), {"padding": "same", "dilation": (3, 1)})
    check(torch.randn(2, 4, 33), weight_of((6, 2, 4)), {"padding": "same", "dilation": 2, "groups": 2})


@pytest.mark.parametrize("level", cpu.build.INSTRUCTION_SETS[:-1])
def test_equals_it_at_random_shapes_on_every_instruction_set(level):
    if cpu.availability() is not None:
        pytest.skip("no C++ kernels here")
    before = cpu.instruction_set()
    if cpu.instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    draw = random.Random(0)
    for _ in range(60):
        groups = draw.choice([1, 1, 2, 3])
        kernel = draw.choice([1, 2, 3, 5]), draw.choice([1, 3, 4])
        arguments = {
            "stride": (draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3])),
            "dilation": (draw.choice([1, 2]), draw.choice([1, 3])),
            "padding": draw.choice([0, (1, 2), (2, 0), 3]),
            "groups": groups,
        }
        shape = (groups * draw.choice([1, 3, 17]), draw.choice([1, 2, 5]), *kernel)
        x = torch.randn(draw.choice([1, 3]), shape[1] * groups, draw.randint(9, 20), draw.randint(10, 40))
        activation = draw.choice(["none", "relu", "silu"])
        check(x, weight_of(shape, draw.choice([0.1, 0.5])), arguments, draw.random() < 0.5, activation)
    cpu.instruction_set(before)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_weight_in_two_blocks_of_columns(samples):
    check(torch.randn(samples, 300, 7, 7), weight_of((5, 300, 3, 3), 0.05), {"padding": 1})


@pytest.mark.parametrize("nnz", [0, 1])
def test_weights_with_hardly_an_entry(nnz):
    weight = torch.zeros(4, 3, 3, 3)
    weight.view(-1)[40 : 40 + nnz] = 2.0
    check(torch.randn(2, 3, 6, 5), weight, {"padding": 1}, activation="silu")


def test_one_sample_no_sample_no_row_and_other_memory_formats():
    weight, x = weight_of((6, 4, 3, 3)), torch.randn(3, 4, 8, 7)
    whole = infer(x, weight)
    torch.testing.assert_close(infer(x[1], weight), whole[1])
    residual = torch.randn(6, 6, 5)
    alone = infer(x[1], weight, residual=residual)
    torch.testing.assert_close(alone, whole[1] + residual)
    assert infer(x[:0], weight).shape == (0, 6, 6, 5)
    assert infer(x, weight[:0]).shape == (3, 0, 6, 5)
    assert torch.equal(infer(x.to(memory_format=torch.channels_last), weight), whole)
    last = torch.randn(3, 6, 6, 5).to(memory_format=torch.channels_last)
    torch.testing.assert_close(infer(x, weight, residual=last), whole + last)
    wide = torch.randn(3, 4, 8, 14)[..., ::2]
    assert torch.equal(infer(wide, weight), infer(wide.contiguous(), weight))


def test_padding_reads_nothing_past_the_input():
    weight, inner = torch.ones(2, 3, 3, 3), torch.full((3 * 5 * 6 + 64,), torch.nan)
    x = inner[32:-32].view(1, 3, 5, 6)
    x.fill_(1.0)
    assert torch.equal(infer(x, weight, padding=1), F.conv2d(x, weight, padding=1))


def test_what_is_not_finite_passes_as_in_the_dense_convolution():
    weight, x = torch.ones(1, 1, 1, 1), torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(infer(x, weight, activation="relu"), x.relu(), equal_nan=True)


def test_threads_do_not_change_a_bit():
    before, results = torch.get_num_threads(), []
    weight, x = weight_of((40, 16, 3, 3)), torch.randn(2, 16, 30, 30)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append((infer(x, weight, padding=1), infer(x[:, :, :7, :7], weight, stride=2)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_passes_opcheck(dtype):
    x, bias, residual = (torch.randn(size).to(dtype) for size in ((2, 4, 8, 7), (6,), (2, 6, 4, 4)))
    buffers, numbers = KERNEL.pack(weight_of((6, 4, 3, 3))).values(), window((3, 3), 4, 2, 1)
    for given in ((bias, residual, 1), (None, None, 0)):
        opcheck(torch.ops.fxsparse.csr_conv_inference.default, (x, *buffers, *given, numbers))


def test_counted_flops_are_two_per_entry_and_pixel():
    weight = weight_of((6, 4, 3, 3))
    nnz = int((weight != 0).sum())
    with FlopCounterMode(display=False) as counter:
        infer(torch.randn(2, 4, 8, 7), weight, padding=1, stride=2)
    assert counter.get_total_flops() == 2 * nnz * 2 * 4 * 4
    problem = Problem("conv2d", (6, 4, 3, 3), 32, nnz, torch.float32, torch.device("cpu"), False)
    assert KERNEL.cost(problem).flops == counter.get_total_flops()
    assert KERNEL.cost(problem).bytes == sum(t.nbytes for t in KERNEL.pack(weight).values())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_with_the_same_numbers(backend):
    weight, x = weight_of((6, 4, 3)), torch.randn(2, 4, 9)
    buffers = tuple(KERNEL.pack(weight).values())

    def twice(x):
        return 2 * KERNEL.run(
            x, None, *buffers, activation="silu", kernel_size=(3,), in_channels=4, padding=1
        )

    compiled = torch.compile(twice, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), twice(x))


def test_autocast_computes_in_bfloat16():
    weight, x = weight_of((6, 4, 3, 3)), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = infer(x, weight, residual=torch.ones(2, 6, 6, 6))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), infer(x, weight) + 1, rtol=0.02, atol=0.05)


def test_refusals_say_why():
    problem = Problem("conv2d", (6, 1, 3, 3), 9, 20, torch.float32, torch.device("cpu"), False)
    assert KERNEL.refuses(problem) == cpu.refuses(problem)  # one input channel alone is nothing special
    depthwise = replace(problem, arguments=(("kernel_size", (3, 3)), ("groups", 6)))
    assert KERNEL.refuses(depthwise)[-1] == "the convolution is depthwise: the dense one is the faster"
    assert KERNEL.refuses(replace(problem, training=True))[-1] == "it has no gradient: cpu-csr-conv-train has"


def test_what_does_not_fit_is_refused():
    weight = weight_of((6, 4, 3, 3))
    with pytest.raises(ValueError, match="larger than the padded input"):
        infer(torch.randn(1, 4, 2, 2), weight)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        infer(torch.randn(1, 4, 5, 5, requires_grad=True), weight)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        infer(torch.randn(1, 4, 5, 5), weight, residual=torch.randn(1, 6, 3, 3, requires_grad=True))
    if cpu.availability() is not None:
        pytest.skip("the reference checks by indexing")
    with pytest.raises(RuntimeError, match="the weight has an entry in column"):
        infer(torch.randn(1, 3, 5, 5), weight, in_channels=3)
    with pytest.raises(RuntimeError, match="channels in 3 groups"):
        infer(torch.randn(1, 4, 5, 5), weight, groups=3, in_channels=4)
    with pytest.raises(RuntimeError, match="a residual of the output's shape"):
        infer(torch.randn(1, 4, 5, 5), weight, residual=torch.randn(1, 6, 1, 1))
    with pytest.raises(RuntimeError, match=r"expected bias \[6\]"):
        infer(torch.randn(1, 4, 5, 5), weight, torch.randn(4))
    values, start, columns = KERNEL.pack(weight).values()
    with pytest.raises(RuntimeError, match="start to ascend to at most"):
        KERNEL.run(
            torch.randn(1, 4, 5, 5), None, values[:-1], start, columns[:-1], kernel_size=(3, 3), in_channels=4
        )


@pytest.mark.parametrize(("samples", "size"), [(8, 7), (16, 7), (11, 7), (6, 14)])
def test_samples_that_share_a_tile_do_not_mix(samples, size):
    weight, x = weight_of((9, 4, 3, 3)), torch.randn(samples, 4, size, size)
    for arguments in ({"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 2}):
        check(x, weight, arguments)
        whole = infer(x, weight, **arguments)
        for n in range(samples):
            torch.testing.assert_close(whole[n], infer(x[n], weight, **arguments))


def test_a_large_result_is_written_whole():
    check(torch.randn(1, 2, 600, 500), weight_of((20, 2, 1, 1)), {})
