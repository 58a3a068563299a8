"""Networks of the papers that torchvision does not have, and two small ones for the tables of tasks."""

from benchmarks.models.mobilenet import MobileNetV1
from benchmarks.models.resnet import CifarResNet18, DigitsResNet, ResNet56
from benchmarks.models.transformer import ByteTransformer, SimpleViT
from benchmarks.models.vgg import SmallVGG16
from benchmarks.models.wide_resnet import WideResNet

__all__ = [
    "ByteTransformer",
    "CifarResNet18",
    "DigitsResNet",
    "MobileNetV1",
    "ResNet56",
    "SimpleViT",
    "SmallVGG16",
    "WideResNet",
]
