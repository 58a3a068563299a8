"""What mask updates add to training: RigL and GSE at 90 %, one update in 100 steps, bf16 autocast, SGD with momentum.

A real update every few steps, then as many steps without one: an update's own time is the difference, divided by the
updates, and its share of training at T = 100 that over 100 ordinary steps.  The optimizer steps on update steps, too
(``variant="torch"``), so that the step which RigL's paper leaves out is no gain.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.methods import gse, rigl

SECONDS = 20.0
EVERY, UPDATES, PERIOD = 6, 4, 100
"""Steps from one update to the next here, updates that are timed, and the T that the share is for."""
METHODS = {"rigl": rigl, "gse": gse}


@dataclass(frozen=True)
class Model:
    """What is trained, and on what."""

    build: Callable[[], nn.Module]
    image: int
    """Pixels of a side."""
    batch: int


def grid(quick: bool, tiny: bool) -> list[dict[str, Any]]:
    """Both methods on both models under masks, and on the transformer by its nonzeros."""
    names = ("tiny",) if tiny else ("ResNet-50",) if quick else ("ResNet-50", "ViT-S/16")
    cells = [
        {"model": name, "method": method, "storage": "masked", "batch": MODELS[name].batch}
        for name in names
        for method in METHODS
    ]
    return cells + [{**c, "storage": "compact"} for c in cells if c["model"] == "ViT-S/16"]


def measure(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """{"ordinary_ms", "update_ms", what an update adds to its step, "share" at T = 100, "dense_ms", "moved"}.

    "moved" is how many updates changed a mask, of ``2 + UPDATES``.
    """
    torch.manual_seed(0)
    made = MODELS[settings["model"]]
    model = made.build().to(device)
    x = torch.randn(settings["batch"], 3, made.image, made.image, device=device)
    labels = torch.randint(10, (len(x),), device=device)
    dense, _ = _stepper(model, x, labels)
    dense(EVERY)
    dense_seconds = dense(UPDATES * EVERY)
    method = METHODS[settings["method"]](
        every=EVERY, stop=EVERY * (2 + UPDATES) + 1, decay="constant", variant="torch"
    )
    plan = fxsparse.Plan(sparsity=0.9, method=method, storage=settings["storage"])
    sparse = fxsparse.compile(model, plan, example_inputs=(x,))
    steps, optimizer = _stepper(sparse, x, labels)
    sparse.attach(optimizer)
    steps(2 * EVERY)
    with_updates, without = steps(UPDATES * EVERY), steps(UPDATES * EVERY)
    ordinary, update = without / (UPDATES * EVERY), (with_updates - without) / UPDATES
    moved = len({row["step"] for row in sparse.report.topology.rows() if row["grown"]})
    return {
        "ordinary_ms": round(1e3 * ordinary, 3),
        "update_ms": round(1e3 * update, 3),
        "share": round(update / (PERIOD * ordinary), 5),
        "dense_ms": round(1e3 * dense_seconds / (UPDATES * EVERY), 3),
        "moved": moved,
    }


def _stepper(
    model: nn.Module, x: Tensor, labels: Tensor
) -> tuple[Callable[[int], float], torch.optim.Optimizer]:
    """A function that makes so many steps and returns their seconds, and the optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def steps(count: int) -> float:
        began = _now(x.device)
        for _ in range(count):
            with torch.autocast(x.device.type, torch.bfloat16):
                loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return _now(x.device) - began

    return steps, optimizer


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _resnet() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50()


def _vit() -> nn.Module:
    from timm import create_model

    return create_model("vit_small_patch16_224")


def _tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)
    )


MODELS = {"ResNet-50": Model(_resnet, 224, 64), "ViT-S/16": Model(_vit, 224, 64), "tiny": Model(_tiny, 8, 4)}
