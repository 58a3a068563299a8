"""Networks of the papers that torchvision does not have."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **options: Any) -> nn.Conv2d:
    """A convolution without bias, "same" padding unless given."""
    return nn.Conv2d(inputs, outputs, kernel, stride, **({"padding": kernel // 2, "bias": False} | options))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet18(nn.Module):
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling (github.com/kuangliu/pytorch-cifar)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64), nn.BatchNorm2d(64)
        widths, strides = (64, 64, 64, 128, 128, 256, 256, 512, 512), (1, 1, 2, 1, 2, 1, 2, 1)
        self.blocks = nn.Sequential(*map(BasicBlock, widths, widths[1:], strides))
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


class PreActivationBlock(nn.Module):
    """Normalise, activate, convolve, twice; the shortcut is a 1x1 convolution where channels differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        rest = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + rest


class WideResNet(nn.Module):
    """WRN-`depth`-`width` for 32x32 images (arXiv:1605.07146)."""

    def __init__(self, depth: int = 22, width: int = 2, classes: int = 10) -> None:
        super().__init__()
        per_group = (depth - 4) // 6
        self.conv1 = conv(3, 16)
        widths = [16, *(channels * width for channels in (16, 32, 64) for _ in range(per_group))]
        strides = [2 if i in (per_group, 2 * per_group) else 1 for i in range(3 * per_group)]
        self.blocks = nn.Sequential(*map(PreActivationBlock, widths, widths[1:], strides))
        self.bn = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.linear(F.avg_pool2d(out, 8).flatten(1))


class Separable(nn.Module):
    """A depthwise 3x3 and a pointwise convolution; stride 2 pads below and to the right, as Keras does."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()
        padding = 0 if stride == 2 else 1
        self.depthwise = conv(inputs, inputs, stride=stride, padding=padding, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.pointwise, self.bn2 = conv(inputs, outputs, 1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.depthwise(self.pad(x))))
        return F.relu6(self.bn2(self.pointwise(out)))


class MobileNetV1(nn.Module):
    """MobileNet (arXiv:1704.04861) with the paddings of keras.applications."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.conv1, self.bn1 = conv(3, 32, stride=2, padding=0), nn.BatchNorm2d(32)
        widths = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
        strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
        self.blocks = nn.Sequential(*map(Separable, widths, widths[1:], strides))
        self.predictions = conv(1024, classes, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(F.relu6(self.bn1(self.conv1(self.pad(x)))))
        return self.predictions(out.mean((2, 3), keepdim=True)).flatten(1)
