"""Compiling and loading the C++ kernels."""

import torch

from fxsparse.kernel import Problem


def availability() -> str | None:
    """None where the C++ kernels run, else the reason why not."""
    return "the C++ kernels come with the commit that follows"


def load() -> bool:
    """Whether the C++ kernels are loaded; the first call builds them."""
    return availability() is None


def implements(name: str) -> bool:
    """Whether the op ``fxsparse::<name>`` has a C++ kernel."""
    return False


def refuses(problem: Problem) -> list[str]:
    """Reasons that hold for every C++ kernel."""
    reasons = []
    if problem.device.type != "cpu":
        reasons.append(f"it runs on cpu, not {problem.device.type}")
    if problem.dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"it has float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    if not reasons and (reason := availability()) is not None:
        reasons.append(reason)
    return reasons
