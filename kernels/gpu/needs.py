"""What holds for every Triton kernel."""

import importlib.util

import torch

from fxsparse.kernel import Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def failures() -> tuple[type[Exception], ...]:
    """What Triton raises where this GPU has too little for a launch, or the assembler does not take its code."""
    if importlib.util.find_spec("triton") is None:
        return ()
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def refuses(problem: Problem) -> list[str]:
    """Reasons that hold for every Triton kernel."""
    reasons = []
    if problem.device.type != "cuda":
        reasons.append(f"it runs on cuda, not {problem.device.type}")
    if problem.dtype not in DTYPES:
        reasons.append(
            f"it has float32, bfloat16 and float16, not {str(problem.dtype).removeprefix('torch.')}"
        )
    if not reasons and importlib.util.find_spec("triton") is None:
        reasons.append("it needs Triton, which is not installed")
    return reasons
