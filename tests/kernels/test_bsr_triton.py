"""The GPU's product with blocks, without a GPU: its numbers in Triton's interpreter, its code for other machines."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from fxsparse.formats import bsr
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import bsr_linear

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def mask_of(rows: int, columns: int, block: int, density: float) -> torch.Tensor:
    kept = torch.rand(rows // block, columns // block) < density
    return kept.repeat_interleave(block, 0).repeat_interleave(block, 1)


def compare(blocks: list[int], tokens: list[int], dtypes: list[torch.dtype]) -> int:
    """Runs in the interpreter: the kernel beside the exact product, over memory that is NaN until written."""
    from fxsparse.kernels.bsr import _triton
    from fxsparse.kernels.gpu import INTERPRETED
    from fxsparse.kernels.library import ACTIVATIONS, activate
    from fxsparse.testing import poisoned_memory, tolerance

    assert INTERPRETED
    cases = list(product(blocks, tokens, dtypes, (0.0, 0.4, 1.0)))
    for seed, (block, count, dtype, density) in enumerate(cases):
        torch.manual_seed(seed)
        rows, columns, code = 3 * block, 2 * block, seed % len(ACTIVATIONS)
        weight = (torch.randn(rows, columns) * mask_of(rows, columns, block, density)).to(dtype)
        packed = bsr.pack(weight, [(block, block)], paired=False)
        x = torch.randn(count, 2 * columns).to(dtype)[:, ::2]
        bias = torch.randn(rows).to(dtype) if seed % 2 else None
        residual = torch.randn(count, rows).to(dtype) if seed % 3 else None
        with poisoned_memory():
            y = _triton.forward(x, **packed, bias=bias, activation=code, residual=residual)
        exact = x.double() @ weight.double().T
        for added in (bias, residual):
            exact += 0 if added is None else added.double()
        exact = activate(exact, ACTIVATIONS[code])
        assert y.dtype == dtype
        error = (y.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
        assert error < tolerance(dtype, columns), (block, count, dtype, density, code, error)
    return len(cases)


def interpreted(call: str) -> subprocess.CompletedProcess[str]:
    code = f"import torch\nfrom tests.kernels.test_bsr_triton import compare\nprint({call})"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_interpreter_gives_the_product() -> None:
    types = "[torch.float32, torch.bfloat16, torch.float16]"
    run = interpreted(f"compare([16, 32], [1, 17, 40], {types})")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["54"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_form_compiles_ahead_of_time_without_spills(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # about whose default Triton 3.9 warns
    from benchmarks.triton_ahead import compiled
    from fxsparse.kernels.bsr._triton import variants

    asked = [
        v for v in variants() if "bfloat16" in v[0] or "128x128 torch.float32" in v[0]
    ]  # the others are smaller
    made = [compiled(*v, capability) for v in asked]
    assert len(made) >= 14
    assert {row["spilled bytes"] for row in made} == {0}
    assert all("mma" in row["tensor cores"] for row in made)


def test_it_is_for_cuda_and_for_blocks() -> None:
    entry = registered()["cuda-bsr"]
    problem = Problem(
        "linear", (64, 64), 4, 512, torch.float16, torch.device("cuda"), training=False, is_blocked=True
    )
    assert entry.refuses(problem) == []
    on_cpu = Problem("linear", (64, 64), 4, 512, torch.float64, torch.device("cpu"), training=True)
    assert entry.refuses(on_cpu) == [
        "it runs on cuda, not cpu",
        "it has float32, bfloat16 and float16, not float64",
        "it has no gradient",
        "zeros do not lie in blocks",
    ]


def test_it_packs_the_largest_blocks_that_tensor_cores_take() -> None:
    entry = registered()["cuda-bsr"]
    for block in (128, 64, 32, 16):
        weight = torch.randn(256, 256) * mask_of(256, 256, block, 0.5)
        packed = entry.pack(weight.bfloat16())
        assert packed["values"].shape[1:] == (block, block)
        assert torch.equal(bsr.to_dense(**packed), weight.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_a_gpu_gives_the_product(dtype: torch.dtype, block: int, tokens: int) -> None:
    weight = (torch.randn(512, 256) * mask_of(512, 256, block, 0.4)).to("cuda", dtype)
    x, bias = (
        torch.randn(tokens, 256, device="cuda", dtype=dtype),
        torch.randn(512, device="cuda", dtype=dtype),
    )
    y = bsr_linear(x, **registered()["cuda-bsr"].pack(weight), bias=bias, activation="gelu")
    exact = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double())
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert (y.double() - exact).abs().max() < allowed * exact.abs().max()
