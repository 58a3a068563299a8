from dataclasses import dataclass
from math import prod

import pytest
import torch
import torchvision


@dataclass(frozen=True)
class Shape:
    """The facts an allocation needs, without a model."""

    name: str
    shape: tuple[int, ...]
    op: str = "linear"

    @property
    def numel(self) -> int:
        return prod(self.shape)


def shapes_of(model: torch.nn.Module) -> list[Shape]:
    return [
        Shape(name, tuple(p.shape), "linear" if p.dim() == 2 else "conv2d")
        for name, p in model.named_parameters()
        if p.dim() > 1 and not name.endswith(("class_token", "pos_embedding"))
    ]


@pytest.fixture(scope="session")
def shape():
    return Shape


@pytest.fixture(scope="session")
def resnet50():
    with torch.device("meta"):
        return shapes_of(torchvision.models.resnet50())


@pytest.fixture(scope="session")
def vit_b_16():
    with torch.device("meta"):
        return shapes_of(torchvision.models.vit_b_16())


@pytest.fixture(scope="session")
def cifar_resnet18():
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=10)
        model.conv1 = torch.nn.Conv2d(3, 64, 3, bias=False)
        return shapes_of(model)
