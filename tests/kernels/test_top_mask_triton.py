"""The GPU's selection without a GPU: its masks in Triton's interpreter, its code for other machines."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from fxsparse.topk import top_mask

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
FEW = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 0.5, 1.0, torch.inf, 1e-42, -1e-42])
"""Zeros of both signs are one score; the last two are no zeros."""


def scores_of(kind: str, rows: int, columns: int) -> torch.Tensor:
    if kind == "few":
        return FEW[torch.randint(len(FEW), (rows, columns))]
    if kind == "crowded":  # all digits but the last are the same
        return 1 + torch.randint(300, (rows, columns)) * 2.0**-23
    return {"equal": torch.zeros, "least": torch.ones, "any": torch.randn}[kind](rows, columns) * (
        -torch.inf if kind == "least" else 1
    )


def compare(dtypes: list[torch.dtype]) -> int:
    """Runs in the interpreter: both ways beside the op in plain PyTorch, over memory that is NaN until written."""
    from fxsparse.kernels.top_mask import _triton, select
    from fxsparse.testing import poisoned_memory

    _triton.HELD = _triton.TILE = 64  # so that small rows take the way of long ones
    kinds = ("any", "few", "crowded", "equal", "least")
    cases = [c for c in product(dtypes, (17, 100), kinds) if c[0] == torch.float32 or c[2] == "few"]
    for seed, (dtype, columns, kind) in enumerate(cases):
        torch.manual_seed(seed)
        scores = scores_of(kind, 2, 2 * columns).to(dtype)[:, ::2]
        for n in (columns // 2, (0, 1, columns, columns + 5)[seed % 4])[seed % 3 == 0 :]:
            with poisoned_memory():
                mask, has_nan = _triton.top_of_rows(scores, torch.tensor(n))
            assert torch.equal(mask, select.top_of_rows(scores, torch.tensor(n))[0]), (
                dtype,
                columns,
                kind,
                n,
            )
            assert has_nan.tolist() == [0]
        if kind == "few" and dtype != torch.float64:
            scores[1, -1] = torch.nan if columns == 17 else -torch.nan
            assert _triton.top_of_rows(scores, torch.tensor(3))[1].tolist() == [1], (dtype, columns)
    empty, has_nan = _triton.top_of_rows(torch.empty(0, 4), torch.tensor(2))
    assert empty.shape == (0, 4)
    assert has_nan.tolist() == [0]
    return len(cases)


def test_the_interpreter_chooses_what_the_cpu_chooses() -> None:
    call = "compare([torch.float32, torch.bfloat16, torch.float16, torch.float64])"
    code = f"import torch\nfrom tests.kernels.test_top_mask_triton import compare\nprint({call})"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["16"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_largest_forms_compile_ahead_of_time_without_spills(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # about whose default Triton 3.9 warns
    from benchmarks.triton_ahead import compiled
    from fxsparse.kernels.top_mask._triton import variants

    largest = ("rows of 8192, torch.float32", "digit 3 of torch.float32", "mask of torch.float64")
    made = [compiled(*v, capability) for v in variants() if any(name in v[0] for name in largest)]
    assert len(made) == len(largest)
    assert {row["spilled bytes"] for row in made} == {0}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 1000), (3, 100_000), (1, 3_000_000)])
@pytest.mark.parametrize("kind", ["any", "few", "equal"])
def test_a_gpu_chooses_what_the_cpu_chooses(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = scores_of(kind, *shape).to(dtype)
    for n in (0, 1, shape[1] // 10, shape[1] - 1, shape[1]):
        assert torch.equal(top_mask(scores.cuda(), n, 1).cpu(), top_mask(scores, n, 1))


@pytest.mark.gpu
def test_a_gpu_selects_inside_a_graph_and_without_the_host() -> None:
    scores, n = torch.randn(2, 50_000, device="cuda"), torch.tensor(0, device="cuda")
    torch.ops.fxsparse.top_of_rows(scores, n)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            mask, has_nan = torch.ops.fxsparse.top_of_rows(scores, n)
        for wanted in (5, 25_000):
            n.fill_(wanted)
            scores.normal_()
            graph.replay()
            expected = torch.ops.fxsparse.top_of_rows(scores, n)[0]
            torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(mask, expected)
            assert mask.sum(1).tolist() == [wanted] * 2
            assert has_nan.item() == 0
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
