"""The convolution that the residual networks are made of."""

from typing import Any

from torch import nn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **options: Any) -> nn.Conv2d:
    """A convolution without bias, "same" padding unless given."""
    return nn.Conv2d(inputs, outputs, kernel, stride, **({"padding": kernel // 2, "bias": False} | options))
