"""Convolutions with a CSR weight against the masked dense convolution in fp64, on both implementations."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import testing
from fxsparse.formats import csr
from fxsparse.kernel import TRAINING, Entries, Problem, packed, registered, tolerance
from fxsparse.kernels import cpu, csr_conv2d, probe
from fxsparse.kernels.csr import patches
from fxsparse.kernels.csr.conv import window

OPS = {1: F.conv1d, 2: F.conv2d}


def layer(shape, density=0.3, dtype=torch.float32, spare=0):
    """(dense weight with an empty first row, values with NaN in unused slots, index)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    if density < 1:
        weight[0] = 0
    matrix = weight.to(dtype).flatten(1)
    flat = matrix.flatten().nonzero().flatten()
    index = csr.from_flat(flat, (matrix.shape[0], matrix.shape[1]), len(flat) + spare)
    values = csr.values_of(matrix, index)
    values[len(flat) :] = torch.nan
    return weight.to(dtype), values, index


def sparse_conv(x, values, index, bias, weight, arguments, **options):
    given = {"in_channels": weight.shape[1] * arguments.get("groups", 1), **arguments}
    return csr_conv2d(
        x, values, index.crow, index.cols, bias, kernel_size=weight.shape[2:], **given, **options
    )


def check(size, shape, density, dtype, arguments, samples=2):
    """Output and the gradients of x, values and bias, with unused slots and memory that is NaN until written."""
    weight, values, index = layer(shape, density, dtype, spare=3)
    nnz = index.nnz
    x = torch.randn(samples, shape[1] * arguments.get("groups", 1), *size).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, values, torch.randn(shape[0]).to(dtype))]
    exact = [t.detach().double().requires_grad_() for t in (x, weight, leaves[2])]
    expected = OPS[len(size)](*exact, **arguments)
    upstream = torch.randn_like(expected).to(dtype)
    with testing.poisoned_memory():
        y = sparse_conv(leaves[0], leaves[1], index, leaves[2], weight, arguments)
        got = torch.autograd.grad(y, leaves, upstream)
    assert [t.dtype for t in (y, *got)] == [dtype] * 4
    grads = torch.autograd.grad(expected, exact, upstream.double())
    wanted = [expected, grads[0], csr.values_of(grads[1].flatten(1), index)[:nnz], grads[2]]
    assert got[1][nnz:].tolist() == [0.0] * 3
    with torch.enable_grad():
        scales = [t.detach().abs().requires_grad_() for t in exact]
        largest = OPS[len(size)](*scales, **arguments)
        bounds = [largest, *torch.autograd.grad(largest, scales, upstream.double().abs())]
    for actual, right, bound in zip((y, got[0], got[1][:nnz], got[2]), wanted, bounds, strict=True):
        scale = bound.max().item() if bound.numel() else 1.0
        testing.assert_close(actual, right, tolerance(dtype, samples * 400), max(scale, 1e-9))


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")  # torch, of its own dense op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("size", "shape", "arguments"),
    [
        ((7, 9), (8, 5, 3, 3), {"padding": 1}),
        ((14, 14), (17, 6, 1, 1), {}),
        ((15, 11), (6, 3, 1, 1), {"stride": 2}),
        ((13, 40), (5, 4, 3, 5), {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
        ((9, 9), (4, 2, 2, 4), {"padding": "same", "dilation": (3, 1)}),
        ((8, 12), (6, 2, 3, 3), {"groups": 3, "padding": 2, "stride": 2}),
        ((6, 6), (4, 1, 3, 3), {"groups": 4, "padding": "valid"}),
        ((12, 10), (3, 2, 2, 2), {"stride": 4, "padding": 3}),
        ((50,), (7, 3, 5), {"padding": 2, "stride": 2}),
        ((33,), (6, 2, 4), {"padding": "same", "groups": 2, "dilation": 2}),
    ],
    ids=str,
)
def test_equals_the_dense_convolution(size, shape, arguments, dtype):
    for density in (0.0, 0.3, 1.0):
        check(size, shape, density, dtype, arguments)


@pytest.mark.parametrize("level", cpu.build.INSTRUCTION_SETS[:-1])
def test_equals_it_at_random_shapes_on_every_instruction_set(level):
    if cpu.availability() is not None:
        pytest.skip("no C++ kernels here")
    before = cpu.instruction_set()
    if cpu.instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    draw = random.Random(0)
    for _ in range(40):
        groups = draw.choice([1, 1, 2, 3])
        kernel = draw.choice([1, 2, 3, 5]), draw.choice([1, 3, 4])
        arguments = {
            "stride": (draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3])),
            "dilation": (draw.choice([1, 2]), draw.choice([1, 3])),
            "padding": draw.choice([0, (1, 2), (2, 0), 3]),
            "groups": groups,
        }
        shape = (groups * draw.choice([1, 3, 17]), draw.choice([1, 2, 5]), *kernel)
        size = draw.randint(9, 20), draw.randint(10, 40)
        check(size, shape, draw.choice([0.1, 0.5]), torch.float32, arguments, draw.choice([1, 3]))
    cpu.instruction_set(before)


def test_blocks_of_rows_change_nothing():
    check((70, 64), (9, 64, 3, 3), 0.1, torch.float32, {"padding": 1}, samples=1)  # a panel holds 31 rows


def test_patches_are_made_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(patches, "_PATCHED", 100)
    check((9, 8), (4, 3, 3, 3), 0.4, torch.float64, {"padding": 1, "stride": 2})
    monkeypatch.setattr(patches, "_PATCHED", 3000)
    check((9, 8), (4, 3, 3, 3), 0.4, torch.float64, {"padding": 1}, samples=5)


def test_one_sample_no_sample_and_channels_last():
    weight, values, index = layer((6, 4, 3, 3))
    x = torch.randn(3, 4, 8, 7)
    whole = sparse_conv(x, values, index, None, weight, {})
    torch.testing.assert_close(sparse_conv(x[1], values, index, None, weight, {}), whole[1])
    assert sparse_conv(x[:0], values, index, None, weight, {}).shape == (0, 6, 6, 5)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    y = sparse_conv(last, values.requires_grad_(), index, None, weight, {})
    assert torch.equal(y, whole)
    upstream = torch.randn_like(y).to(memory_format=torch.channels_last)
    plain = x.clone().requires_grad_()
    expected = torch.autograd.grad(
        sparse_conv(plain, values, index, None, weight, {}), (plain, values), upstream.contiguous()
    )
    for got, right in zip(torch.autograd.grad(y, (last, values), upstream), expected, strict=True):
        assert torch.equal(got, right)


def test_threads_do_not_change_a_bit():
    weight, values, index = layer((40, 16, 3, 3))
    x, values = torch.randn(5, 16, 20, 20, requires_grad=True), values.requires_grad_()
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = sparse_conv(x, values, index, None, weight, {"padding": 1})
        results.append((y, *torch.autograd.grad(y, (x, values), torch.ones_like(y))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_pass_opcheck(dtype):
    _, values, index = layer((6, 4, 3, 3), dtype=dtype)
    x, grad, bias = (torch.randn(size).to(dtype) for size in ((2, 4, 8, 7), (2, 6, 4, 4), (6,)))
    numbers = window((3, 3), 4, 2, 1)
    opcheck(torch.ops.fxsparse.csr_conv_forward.default, (x, values, index.crow, index.cols, bias, numbers))
    for needs in itertools.product((True, False), repeat=2):
        arguments = (grad, x, values, index.crow, index.cols, numbers, *needs)
        opcheck(torch.ops.fxsparse.csr_conv_backward.default, arguments)


def test_counted_flops_are_two_per_stored_entry_and_pixel():
    weight, values, index = layer((6, 4, 3, 3))
    x = torch.randn(2, 4, 8, 7, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = sparse_conv(x, values.requires_grad_(), index, None, weight, {"padding": 1, "stride": 2})
        assert counter.get_total_flops() == 2 * values.numel() * 2 * 4 * 4
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * values.numel() * 2 * 4 * 4
    kernel = registered()[TRAINING["conv2d"]]
    problem = Problem("conv2d", (6, 4, 3, 3), 32, values.numel(), torch.float32, torch.device("cpu"), True)
    assert kernel.cost(problem).flops == counter.get_total_flops()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("probe_key", [-1, 21])
def test_compiles_whole_with_the_same_numbers(backend, probe_key):
    weight, values, index = layer((6, 4, 3))
    x, bias = torch.randn(2, 4, 9, requires_grad=True), torch.randn(6, requires_grad=True)
    values.requires_grad_()

    def loss(x, values, bias):
        return sparse_conv(x, values, index, bias, weight, {"padding": 1}, probe_key=probe_key).square().sum()

    expected = torch.autograd.grad(loss(x, values, bias), (x, values, bias))
    stashed = probe.PROBES.pop(probe_key, [])
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(x, values, bias), (x, values, bias)), expected, strict=True):
        torch.testing.assert_close(a, b)
    again = probe.PROBES.pop(probe_key, [])
    assert len(stashed) == len(again) == (probe_key >= 0)
    for a, b in zip(stashed, again, strict=True):
        torch.testing.assert_close(a, b)
        assert [t.shape for t in a] == [(2, 4, 9), (2, 6, 9)]


def test_autocast_computes_in_bfloat16_and_returns_fp32_gradients():
    weight, values, index = layer((6, 4, 3, 3))
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_conv(x, values.requires_grad_(), index, None, weight, {})
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.float().sum(), (x, values))} == {torch.float32}


def test_no_tensor_of_the_weights_or_the_patches_size_is_made():
    weight, values, index = layer((128, 128, 3, 3), 0.01)
    x = torch.randn(1, 128, 12, 12, requires_grad=True)
    values.requires_grad_()
    with testing.forbid_tensors_of(128 * 12 * 12 + 1):
        sparse_conv(x, values, index, None, weight, {"padding": 1}).sum().backward()


def test_refuses_what_does_not_fit():
    weight, values, index = layer((6, 4, 3, 3))
    with pytest.raises(ValueError, match="larger than the padded input"):
        sparse_conv(torch.randn(1, 4, 2, 2), values, index, None, weight, {})
    if cpu.availability() is not None:
        pytest.skip("the reference checks by indexing")
    with pytest.raises(RuntimeError, match="the weight has an entry in column"):
        sparse_conv(torch.randn(1, 3, 5, 5), values, index, None, weight, {"in_channels": 3})
    with pytest.raises(RuntimeError, match="channels in 3 groups"):
        sparse_conv(torch.randn(1, 4, 5, 5), values, index, None, weight, {"groups": 3, "in_channels": 4})
    with pytest.raises(RuntimeError, match="crow to end with at most"):
        csr_conv2d(
            torch.randn(1, 4, 5, 5),
            values[:-1],
            index.crow,
            index.cols[:-1],
            kernel_size=(3, 3),
            in_channels=4,
        )


def test_packs_the_same_from_nonzeros_alone() -> None:
    weight = torch.randn(6, 4, 3, 3) * (torch.rand(6, 4, 3, 3) < 0.2)
    weight[2] = 0
    kernel = registered()[TRAINING["conv2d"]]
    matrix = weight.flatten(1)
    mask = matrix != 0
    entries = Entries(matrix[mask], mask.nonzero().t().int(), tuple(weight.shape))
    got, expected = packed(kernel, entries), packed(kernel, weight)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
