"""The dense product of the vendor's library, a candidate like any other kernel."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels.library import activate


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight}


def _run(x, bias, weight, activation: str = "none", in_features: int | None = None) -> Tensor:
    return activate(F.linear(x, weight, bias), activation)


def _pack_masked(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight, "mask": weight != 0}


def _run_masked(x, bias, weight, mask, activation: str = "none", in_features: int | None = None) -> Tensor:
    return activate(F.linear(x, weight * mask, bias), activation)


def _refuses(problem: Problem) -> list[str]:
    return ["training needs the mask: dense-masked has it"] if problem.training else []


def _refuses_masked(problem: Problem) -> list[str]:
    return [] if problem.training else ["inference folds the mask: dense needs no multiplication"]


def _cost(problem: Problem) -> Cost:
    numel = problem.shape[0] * problem.shape[1]
    return Cost((6 if problem.training else 2) * problem.batch * numel, numel * problem.dtype.itemsize)


DENSE = register(Kernel("dense", "linear", "dense", _pack, _run, _run, _refuses, _cost))
MASKED = register(
    Kernel("dense-masked", "linear", "dense", _pack_masked, _run_masked, _run_masked, _refuses_masked, _cost)
)
