"""MobileNet v1, of RigL's FLOP tables."""

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.convolution import conv


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
