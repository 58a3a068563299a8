"""The torchvision and timm models of the coverage table, with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

Build = Callable[[], tuple[nn.Module, Any]]
_TIMM = Path(__file__).with_name("timm.txt")
"""Names, one a line: of every family in timm the smallest ones, 200 in all."""


def torchvision_models() -> dict[str, Build]:
    """{name: function that builds the model and its example inputs}: classification, segmentation, detection."""
    kinds: tuple[tuple[Any, Callable[[str], tuple[nn.Module, Any]]], ...] = (
        (torchvision.models, torchvision_model),
        (torchvision.models.segmentation, segmentation_model),
        (torchvision.models.detection, detection_model),
    )
    return {
        name: lambda name=name, build=build: build(name)
        for module, build in kinds
        for name in torchvision.models.list_models(module=module)
    }


def timm_models() -> dict[str, Build]:
    """{name: function that builds the model and its example inputs}."""
    return {name: lambda name=name: timm_model(name) for name in _TIMM.read_text().split()}


def torchvision_model(name: str) -> tuple[nn.Module, Any]:
    """A torchvision classifier with random weights, at a resolution that its architecture still allows."""
    options: dict[str, Any] = {}
    size = 224 if name.startswith("maxvit") else 299 if name == "inception_v3" else 96
    if name.startswith("vit"):
        size = options["image_size"] = 56 if "14" in name else 64
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, **options), torch.randn(2, 3, size, size)


def segmentation_model(name: str) -> tuple[nn.Module, Any]:
    """A torchvision segmentation model without pretrained weights."""
    return torchvision.models.get_model(name, weights=None, weights_backbone=None), torch.randn(2, 3, 64, 64)


def detection_model(name: str) -> tuple[nn.Module, Any]:
    """A torchvision detector for five classes: two images, and a box and its mask or keypoints in each."""
    sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 96}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **sizes)
    return model, ([torch.rand(3, 96, 96) for _ in range(2)], [_target(k) for k in range(2)])


def _target(k: int) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([[8.0, 12.0, 60.0 + k, 70.0]]),
        "labels": torch.tensor([1 + k]),
        "masks": torch.ones(1, 96, 96, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }


def timm_model(name: str) -> tuple[nn.Module, Any]:
    """A timm model with random weights: at its own resolution where that is fixed, else at 128 pixels or its least."""
    model: Any = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    if not model.pretrained_cfg.get("fixed_input_size"):
        least = model.pretrained_cfg.get("min_input_size") or (0, 128, 128)
        size = (size[0], *(min(own, max(128, floor)) for own, floor in zip(size[1:], least[1:], strict=True)))
    return model, torch.randn(2, *size)
