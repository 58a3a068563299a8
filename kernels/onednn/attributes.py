"""What PyTorch's ops of oneDNN call the activations, and where they can run."""

import torch

from fxsparse.kernel import Problem
from fxsparse.kernels.library import ACTIVATIONS, COMPILED

_NAMED: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "hardswish": ("hardswish", [], ""),
}
ATTRIBUTES = tuple(_NAMED[activation] for activation in ACTIVATIONS)
"""Name, numbers and algorithm of each activation, by its place in ACTIVATIONS."""


def refusals(problem: Problem) -> list[str]:
    """Reasons of every op of oneDNN not to run a problem."""
    reasons = ["it has no gradient"] if problem.training else []
    if problem.device.type != "cpu":
        reasons.append(f"it runs on cpu, not {problem.device.type}")
    if problem.dtype not in COMPILED:
        reasons.append(f"it has float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}")
    if not torch.backends.mkldnn.is_available():
        reasons.append("this PyTorch was built without oneDNN")
    elif problem.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reasons.append("this processor has no bfloat16 for oneDNN")
    return reasons
