"""Triton's interpreter in a process of its own: it has to be asked for before the kernels are imported."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from fxsparse.testing import tolerance

ROOT = Path(__file__).parents[2]


def interpreted(module: str, *calls: str) -> list[str]:
    """What `calls` of functions of a test module print there."""
    code = f"import torch\nfrom {module} import *\n" + "\n".join(f"print({call})" for call in calls)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def check_sums(made: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, terms: int) -> None:
    """AssertionError unless `made` is of `dtype` and as near to `exact` as sums of `terms` products are."""
    assert made.dtype == dtype
    assert made.shape == exact.shape
    error = (made.double() - exact).abs().max() / exact.abs().max().clamp(min=1)
    assert error < tolerance(dtype, terms), (made.shape, dtype, terms, error)
