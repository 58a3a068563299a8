"""Ops that images go through between convolutions, in whatever order memory holds them and each sample by itself."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTWISE: set[Any] = {
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardtanh, F.leaky_relu, F.sigmoid, F.hardsigmoid,
    torch.relu, torch.sigmoid, torch.tanh,
}  # fmt: skip
POOLINGS: set[Any] = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d}
POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Sigmoid, nn.Hardsigmoid,
    nn.Identity,
)  # fmt: skip
MODULES = (*POINTWISE_MODULES, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
ADDS: set[Any] = {operator.add, torch.add}


def channels_last(x: Tensor) -> Tensor:
    """A copy of images [samples, channels, height, width] whose channels lie side by side in memory."""
    return x.clone(memory_format=torch.channels_last)


def channels_first(x: Tensor) -> Tensor:
    """A copy of images [samples, channels, height, width] whose pixels of a channel lie side by side in memory."""
    return x.clone(memory_format=torch.contiguous_format)


COPIES: set[Any] = {channels_last, channels_first}
