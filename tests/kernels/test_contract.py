"""Every shipped kernel against the contract of fxsparse.testing, on every instruction set of this machine."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fxsparse import testing
from fxsparse.errors import UnsupportedError
from fxsparse.kernel import registered, tolerance
from fxsparse.kernels import cpu
from fxsparse.kernels.cpu.build import INSTRUCTION_SETS

COMPILED = ("cpu-csr", "cpu-csr-train", "cpu-condensed", "cpu-striped", "cpu-bsr")
COMPILED += ("cpu-nm", "cpu-csr-conv", "cpu-csr-conv-train", "cpu-depthwise")


@pytest.mark.parametrize(
    "name", ["dense", "dense-masked", "dense-conv", "dense-conv-masked", "mkl", "onednn", "onednn-conv"]
)
def test_dense_kernels_fulfil_the_contract(name):
    testing.check_kernel(registered()[name])


@pytest.mark.parametrize("level", INSTRUCTION_SETS[:-1])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernels_fulfil_the_contract(name, level, instruction_set):
    if (reason := cpu.availability()) is not None:
        pytest.skip(reason)
    if instruction_set(level) != level:
        pytest.skip(f"this CPU has no {level}")
    testing.check_kernel(registered()[name])


ON_TENSOR_CORES = ("cuda-bsr", "cuda-bsr-train", "cuda-nm")
"""GPU kernels whose reference runs on the CPU, by the same entry."""


GPU_KERNELS = ("cuda-csr", "cuda-csr-train", "cuda-condensed", "cuda-csr-conv", *ON_TENSOR_CORES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_KERNELS)
def test_gpu_kernels_fulfil_the_contract(name, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of the dense product, where memory is poisoned
    testing.check_kernel(registered()[name], "cuda")


@pytest.mark.parametrize("level", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    "name", ["cpu-csr", "cpu-condensed", "cpu-lookup", "cpu-striped", "cpu-bsr", "cpu-nm"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_kernels_add_a_residual_before_the_activation(name, level, dtype, instruction_set):
    if instruction_set(level) not in (level, "reference"):
        pytest.skip(f"this CPU has no {level}")
    entry, generator = registered()[name], torch.Generator().manual_seed(0)
    columns = torch.rand(37, 53, generator=generator).topk(7, 1).indices
    weight = torch.zeros(37, 53).scatter_(1, columns, torch.randn(37, 7, generator=generator)).to(dtype)
    weight[4:9] = 0  # rows that condensed and lookup fill apart
    bias, buffers = torch.randn(37, generator=generator).to(dtype), list(entry.pack(weight).values())
    for batch in (1, 2, 5, 70):
        x, residual = (torch.randn(batch, n, generator=generator).to(dtype) for n in (53, 37))
        inputs = x.double(), weight.double(), bias.double()
        exact = F.gelu(F.linear(*inputs) + residual.double())
        scale = (F.linear(*(t.abs() for t in inputs)) + residual.double().abs()).max()
        for run in (entry.run, entry.reference):
            y = run(x, bias, *buffers, activation="gelu", residual=residual, in_features=53)
            assert y.dtype == dtype
            assert (y.double() - exact).abs().max() / scale < tolerance(dtype, 55)


@pytest.mark.parametrize(
    "name", ["cpu-csr", "cpu-condensed", "cpu-lookup", "cpu-striped", "cpu-bsr", "cpu-nm"]
)
def test_a_residual_of_another_dtype_is_added_after_and_of_another_shape_is_refused(name):
    entry = registered()[name]
    buffers, x = list(entry.pack(torch.eye(4)).values()), torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    with torch.autocast("cpu", torch.bfloat16):
        y = entry.run(x, None, *buffers, activation="relu", residual=torch.ones(1, 4), in_features=4)
    assert (y.dtype, y.tolist()) == (torch.float32, [[2.0, 0.0, 4.0, 0.0]])
    if cpu.availability() is None:
        with pytest.raises(RuntimeError, match="expected a residual of the output's shape, with 4 features"):
            entry.run(x, None, *buffers, residual=torch.ones(4), in_features=4)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        entry.run(x, None, *buffers, residual=torch.ones(1, 4, requires_grad=True), in_features=4)


INFERENCE = ("cpu-csr", "cpu-condensed", "cpu-lookup", "cpu-striped", "cpu-bsr", "cpu-nm", "onednn", "mkl")


# What PyTorch says of itself at the first such derivative, and of vmap over oneDNN's product.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:There is a performance drop")
@pytest.mark.parametrize("name", INFERENCE)
def test_a_derivative_in_either_mode_is_refused_instead_of_lost(name):
    entry = registered()[name]
    buffers, x, bias = list(entry.pack(torch.eye(4)).values()), torch.ones(2, 4), torch.zeros(4)

    def run(x, bias=bias):
        return entry.run(x, bias, *buffers, in_features=4)

    def total(x):
        return torch.vmap(run)(x[:, None]).sum()

    lost = (
        lambda: torch.func.jvp(run, (x,), (x,)),
        lambda: torch.func.jvp(total, (x,), (x,)),
        lambda: torch.func.grad(total)(x),
        lambda: torch.func.jvp(lambda bias: run(x, bias), (bias,), (bias,)),
        lambda: run(x, bias.clone().requires_grad_()),
    )
    for call in lost:
        with pytest.raises(UnsupportedError, match="no backward and no forward-mode"):
            call()
    with torch.no_grad(), forward_ad.dual_level():
        with pytest.raises(UnsupportedError, match="no backward and no forward-mode"):
            run(forward_ad.make_dual(x, x))
        assert torch.equal(run(x), x)
        assert torch.equal(torch.vmap(run)(x), x)


LINEAR = ("cpu-csr", "cpu-csr-train", "cpu-condensed", "cpu-lookup", "cpu-striped", "cpu-bsr", "cpu-nm")
LINEAR += ON_TENSOR_CORES


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_input_of_another_dtype_or_width_than_the_weight_is_refused(name, dtype):
    entry = registered()[name]
    weight = torch.zeros(70, 32, dtype=dtype)
    weight[:, [3, 8]] = 1  # no entry in a column that a narrower x lacks
    buffers = list(entry.pack(weight).values())
    wrong = [torch.ones(2, 32, dtype=other) for other in OTHER_DTYPES if other != dtype]
    wrong += [torch.ones(size, dtype=dtype) for size in ((2, 40), (2, 31), (40,), (64, 33), (2, 32, 1), ())]
    for x in wrong:
        kind = str(x.dtype).removeprefix("torch.")
        expected = rf"expected x \[..., 32\] in {str(dtype)[6:]} as the weight is, got \[.*\] in \w+"
        for run in (entry.run, entry.reference):
            with pytest.raises(RuntimeError, match=expected) as raised:
                run(x, None, *buffers, in_features=32)
            assert str(raised.value).partition("got ")[2].startswith(f"{list(x.shape)} in {kind}")


OTHER_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
OTHER_DTYPES += (torch.int64, torch.uint8, torch.bool, torch.complex64)


@pytest.mark.parametrize("name", LINEAR)
def test_a_compiler_refuses_another_dtype_or_width_too(name):
    entry = registered()[name]
    buffers = list(entry.pack(torch.eye(32)).values())
    compiled = torch.compile(lambda x: entry.run(x, None, *buffers, in_features=32), backend="aot_eager")
    for x in (
        torch.ones(2, 40),
        torch.ones(2, 32, dtype=torch.bfloat16),
        torch.ones(2, 32, dtype=torch.long),
    ):
        with pytest.raises(RuntimeError, match=r"expected x \[..., 32\] in float32 as the weight is, got"):
            compiled(x)


@pytest.mark.parametrize("name", LINEAR)
def test_autocast_leaves_integers_to_be_refused(name):
    entry = registered()[name]
    buffers = list(entry.pack(torch.eye(32)).values())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"in float32 as .* in int64"),
    ):
        entry.run(torch.ones(2, 32, dtype=torch.long), None, *buffers, in_features=32)


@pytest.mark.parametrize("name", LINEAR)
def test_a_sparse_input_is_no_endless_call(name):
    entry = registered()[name]
    buffers = list(entry.pack(torch.eye(32)).values())
    try:
        y = entry.run(torch.eye(32).to_sparse(), None, *buffers, in_features=32)
    except (RuntimeError, NotImplementedError) as error:
        assert not isinstance(error, RecursionError)  # noqa: PT017
    else:
        assert torch.equal(y, torch.eye(32))


CONVOLUTIONS = (
    ((8, 16, 3, 3), (8, 8), 1),
    ((8, 4, 3, 3), (8, 8), 4),
    ((8, 16, 1, 1), (8, 8), 1),
    ((8, 16, 3), (8,), 1),
)


@pytest.mark.parametrize("name", ["cpu-csr-conv", "cpu-csr-conv-train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "size", "groups"), CONVOLUTIONS)
def test_images_of_other_channels_or_of_another_dtype_are_refused(shape, size, groups, dtype, name):
    entry, bias = registered()[name], torch.zeros(8, dtype=dtype)
    weight = torch.zeros(shape, dtype=dtype)
    weight[:, 1] = 1  # no entry in a channel that an x of fewer lacks
    buffers = list(entry.pack(weight).values())
    given = {"kernel_size": shape[2:], "in_channels": 16, "groups": groups}
    wrong = [torch.ones(2, 16, *size, dtype=other) for other in OTHER_DTYPES if other != dtype]
    wrong += [torch.ones(*lead, *size, dtype=dtype) for lead in ((2, 12), (2, 20), (12,), (20,))]
    for x, run in itertools.product(wrong, (entry.run, entry.reference)):
        with pytest.raises(RuntimeError) as raised:
            run(x, bias, *buffers, **given)
        expected, _, got = str(raised.value).partition(", got ")
        assert f"expected images of 16 channels in {str(dtype)[6:]} as the weight is" in expected
        assert str(x.shape[-len(size) - 1]) in got
        assert got.endswith(f"in {str(x.dtype)[6:]}")
    for x in (torch.ones(16, dtype=dtype), torch.ones(1, 2, 16, *size, dtype=dtype)):
        with pytest.raises(ValueError, match=r"expected x \[samples, 16, .*\] or \[16, .*\], got \[.*16"):
            entry.run(x, bias, *buffers, **given)


@pytest.mark.parametrize("name", ["cpu-csr-conv", "cpu-csr-conv-train"])
def test_a_compiler_and_autocast_refuse_images_of_other_channels_or_integers(name):
    entry = registered()[name]
    buffers = list(entry.pack(torch.ones(8, 16, 3, 3)).values())

    def run(x):
        return entry.run(x, torch.zeros(8), *buffers, kernel_size=(3, 3), in_channels=16)

    for x in (torch.ones(2, 12, 8, 8), torch.ones(2, 16, 8, 8, dtype=torch.long)):
        with pytest.raises(RuntimeError, match="expected images of 16 channels in float32"):
            torch.compile(run, backend="aot_eager")(x)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"in float32 .* in int64"):
        run(torch.ones(2, 16, 8, 8, dtype=torch.long))


def test_lookups_fulfil_the_contract(instruction_set):
    if instruction_set("avx512vbmi") != "avx512vbmi":
        pytest.skip("this CPU has no AVX-512 VBMI")
    testing.check_kernel(registered()["cpu-lookup"])


def test_the_contract_catches_a_wrong_result_and_an_unwritten_entry():
    from dataclasses import replace

    dense = registered()["dense"]
    wrong = replace(
        dense,
        run=lambda x, bias, w, activation="none", **_: dense.run(x, bias, w * 1.001, activation),
    )
    with pytest.raises(AssertionError, match="relative error"):
        testing.check_kernel(wrong)
    unwritten = replace(dense, run=lambda x, bias, w, **_: x.new_empty(*x.shape[:-1], len(w)))
    with pytest.raises(AssertionError, match="finite"):
        testing.check_kernel(unwritten)


def test_compiled_ops_see_poisoned_memory():
    with testing.poisoned_memory():
        assert torch.empty(3).isnan().all()
