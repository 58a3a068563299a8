"""The dense convolution of the vendor's library under a mask: what compact convolutions have to beat in training."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels.library import activate


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight, "mask": weight != 0}


def _run(
    x, bias, weight, mask, activation: str = "none", *, kernel_size: Any = None, **arguments: Any
) -> Tensor:
    op: Any = F.conv1d if weight.dim() == 3 else F.conv2d
    return activate(op(x, weight * mask, bias, **arguments), activation)


def _refuses(problem: Problem) -> list[str]:
    return [] if problem.training else ["it is for training"]


def _cost(problem: Problem) -> Cost:
    numel = prod(problem.shape)
    return Cost(6 * problem.batch * numel, numel * problem.dtype.itemsize)


MASKED_CONV = register(Kernel("dense-conv-masked", "conv2d", "dense", _pack, _run, _run, _refuses, _cost))
