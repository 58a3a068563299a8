"""WRN-22-2, of RigL's CIFAR-10 tables."""

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.convolution import conv


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
