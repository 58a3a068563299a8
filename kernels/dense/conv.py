"""The dense convolution of the vendor's library: what sparse ones have to beat, in training under a mask."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels.library import activate


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight}


def _run(
    x,
    bias,
    weight,
    activation: str = "none",
    *,
    kernel_size: Any = None,
    in_channels: int | None = None,
    **arguments: Any,
) -> Tensor:
    op: Any = F.conv1d if weight.dim() == 3 else F.conv2d
    return activate(op(x, weight, bias, **arguments), activation)


def _pack_masked(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight, "mask": weight != 0}


def _run_masked(x, bias, weight, mask, activation: str = "none", **arguments: Any) -> Tensor:
    return _run(x, bias, weight * mask, activation, **arguments)


def _refuses(problem: Problem) -> list[str]:
    return ["training needs the mask: dense-conv-masked has it"] if problem.training else []


def _refuses_masked(problem: Problem) -> list[str]:
    return [] if problem.training else ["it is for training"]


def _cost(problem: Problem) -> Cost:
    numel = prod(problem.shape)
    return Cost((6 if problem.training else 2) * problem.batch * numel, numel * problem.dtype.itemsize)


DENSE_CONV = register(Kernel("dense-conv", "conv2d", "dense", _pack, _run, _run, _refuses, _cost))
MASKED_CONV = register(
    Kernel(
        "dense-conv-masked", "conv2d", "dense", _pack_masked, _run_masked, _run_masked, _refuses_masked, _cost
    )
)
