"""The GPU's sparse convolution, without a GPU: its numbers in Triton's interpreter, its code for other machines."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fxsparse.kernel import Problem, registered
from fxsparse.kernels.csr.conv import window

triton = pytest.importorskip("triton")
SPILLED = 8 if triton.__version__.startswith("3.6.") else 0
"""Bytes at most, of the forms below: the compiler that came with torch 2.11 spills in some."""
ROOT = Path(__file__).parents[2]
CASES = (
    ((2, 6, 7, 7), (8, 6, 3, 3), {"padding": 1}),
    ((1, 4, 13, 20), (5, 4, 3, 5), {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
    ((2, 6, 8, 12), (6, 2, 3, 3), {"groups": 3, "padding": 2, "stride": 2}),
    ((3, 16, 4, 4), (9, 16, 1, 1), {}),
    ((2, 3, 8, 9), (4, 3, 2, 2), {"stride": 2}),
    ((1, 2, 5, 5), (3, 2, 2, 4), {"padding": "same"}),
)


def weight_of(shape: tuple[int, ...], density: float) -> torch.Tensor:
    weight = torch.randn(shape) * (torch.rand(shape) < density)
    if density < 1:
        weight[0] = 0
    return weight


def compare(cases: list[int], dtypes: list[torch.dtype], densities: list[float]) -> int:
    """Runs in the interpreter: the kernel beside the dense convolution, over memory that is NaN until written."""
    from fxsparse.formats import column_blocks
    from fxsparse.kernels.csr import _conv_triton
    from fxsparse.kernels.library import ACTIVATIONS, activate
    from fxsparse.testing import poisoned_memory, tolerance

    todo = list(product(cases, dtypes, densities))
    for seed, (case, dtype, density) in enumerate(todo):
        torch.manual_seed(seed)
        size, shape, arguments = CASES[case]
        weight, code = weight_of(shape, density).to(dtype), seed % len(ACTIVATIONS)
        blocks = column_blocks.from_dense(weight.flatten(1), 20)  # more than one of the larger weights
        x = torch.randn(*size[:-1], 2 * size[-1]).to(dtype)[..., ::2]
        bias = torch.randn(shape[0]).to(dtype) if seed % 2 else None
        exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), **arguments)
        residual = torch.randn(exact.shape).to(dtype) if seed % 3 else None
        numbers = window(shape[2:], size[1], **arguments)
        packed = (blocks.values, blocks.start, blocks.columns)
        with poisoned_memory():
            y = _conv_triton.forward(x, *packed, bias, residual, code, numbers)
        exact = activate(exact if residual is None else exact + residual.double(), ACTIVATIONS[code])
        assert (y.dtype, y.is_contiguous()) == (dtype, True)
        error = (y.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
        assert error < tolerance(dtype, shape[1] * 9), (case, dtype, density, error)
    none = _conv_triton.forward(x[:0], *packed, bias, None, 0, numbers)
    assert none.shape == (0, *exact.shape[1:])
    return len(todo)


def test_the_interpreter_gives_the_convolution() -> None:
    every = "range(6), [torch.float32], [0.0, 0.3]"
    calls = (f"compare({every})", "compare([2, 0], [torch.bfloat16, torch.float16], [1.0, 0.3])")
    code = "import torch\nfrom tests.kernels.test_csr_conv_triton import compare\n"
    run = subprocess.run(
        [sys.executable, "-c", code + "\n".join(f"print({call})" for call in calls)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["12", "8"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_forms_compile_ahead_of_time_without_spills(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # about whose default Triton 3.9 warns
    from benchmarks.triton_ahead import compiled
    from fxsparse.kernels.csr._conv_triton import variants

    asked = ("conv 7x7, stride 2 torch.float32, 64 pixels x 16", "conv 1x1 torch.bfloat16, 256 pixels x 4")
    made = [compiled(*v, capability) for v in variants() if v[0] in asked]
    assert len(made) == len(asked)
    assert max(row["spilled bytes"] for row in made) <= SPILLED


def test_the_first_tile_is_as_wide_as_the_pixels_and_all_are_compiled_ahead() -> None:
    from fxsparse.kernels.csr._conv_triton import TILES, tiles_for, variants

    assert [tiles_for(pixels)[0] for pixels in (1, 32, 49, 3136)] == [(32, 32), (32, 32), (64, 16), (256, 4)]
    assert set(tiles_for(10**6)) == set(TILES)
    ahead = {(v[2]["TILE"], v[2]["ENTRIES"]) for v in variants()}
    assert ahead == set(TILES)


def test_it_is_for_inference_on_cuda() -> None:
    entry = registered()["cuda-csr-conv"]
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert entry.refuses(Problem("conv2d", (8, 4, 3, 3), 64, 30, torch.float16, cuda, training=False)) == []
    groups = (("groups", 8),)
    wrong = Problem("conv2d", (8, 1, 3, 3), 64, 30, torch.float64, cpu, training=True, arguments=groups)
    assert entry.refuses(wrong) == [
        "it runs on cuda, not cpu",
        "it has float32, bfloat16 and float16, not float64",
        "it has no gradient: on a GPU convolutions train dense under a mask",
        "the convolution is depthwise: the dense one is the faster",
    ]


def test_its_weight_is_one_block_where_numbers_of_16_bits_reach() -> None:
    entry = registered()["cuda-csr-conv"]
    for channels, blocks in ((3600, 1), (3700, 2)):
        weight = torch.zeros(2, channels, 3, 3)
        weight[0, -1, -1, -1] = 1
        packed = entry.pack(weight)
        assert packed["start"].shape[0] == blocks
        assert packed["columns"].dtype == torch.int16
        assert packed["columns"].min() >= 0
        y = entry.reference(torch.ones(1, channels, 3, 3), None, *packed.values(), kernel_size=(3, 3),
                            in_channels=channels)  # fmt: skip
        assert y.flatten().tolist() == [1, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "shape", "arguments"), CASES[:-1])
def test_a_gpu_gives_the_convolution(size, shape, arguments, dtype) -> None:
    entry = registered()["cuda-csr-conv"]
    size = (*size[:2], 3 * size[2], 3 * size[3])
    weight, x = weight_of(shape, 0.3).to("cuda", dtype), torch.randn(size, device="cuda", dtype=dtype)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    given = {"kernel_size": shape[2:], "in_channels": size[1], "activation": "relu", **arguments}
    y = entry.run(x, bias, *entry.pack(weight).values(), **given)
    exact = F.relu(F.conv2d(x.double(), weight.double(), bias.double(), **arguments))
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (y.double() - exact).abs().max() < allowed * exact.abs().max()
