"""Residual networks: for CIFAR (ResNet-18, ResNet-56 with parameter-free shortcuts), and one for the digits."""

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.convolution import conv


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


class PaddedBlock(nn.Module):
    """Two 3x3 convolutions; where shapes differ the shortcut takes every other pixel and pads channels with zeros.

    Option A of arXiv:1512.03385, section 4.2: shortcuts have no parameters.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride = stride
        before = (outputs - inputs) // 2
        self.padding = (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + F.pad(x[:, :, :: self.stride, :: self.stride], self.padding))


class ResNet56(nn.Module):
    """ResNet-56 for 32x32 images (arXiv:1512.03385, section 4.2), all widths times `width`."""

    def __init__(self, classes: int = 10, width: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16 * width), nn.BatchNorm2d(16 * width)
        widths = [channels * width for channels in (16, *[16] * 9, *[32] * 9, *[64] * 9)]
        strides = [2 if i in (9, 18) else 1 for i in range(27)]
        self.blocks = nn.Sequential(*map(PaddedBlock, widths, widths[1:], strides))
        self.linear = nn.Linear(64 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a narrow middle; the shortcut is a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, middle, 1), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv(middle, middle, stride=stride), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv(middle, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Four bottleneck blocks for 8 x 8 grey images: 32 channels in the middle at 8 x 8 pixels, 64 at 4 x 4."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(1, 32), nn.BatchNorm2d(32)
        middles, outputs, strides = (32, 32, 64, 64), (32, 64, 64, 128, 128), (1, 1, 2, 1)
        self.blocks = nn.Sequential(*map(Bottleneck, outputs, middles, outputs[1:], strides))
        self.linear = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
