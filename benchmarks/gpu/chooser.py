"""Whether `choose` takes the fastest kernel: 200 layers from a fixed seed, every candidate timed again afterwards."""

import itertools
import random
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import precision
from benchmarks.gpu.rivals import OURS, Rival, compare, kernel, normal, problem
from fxsparse.choosing import choose

SECONDS = 1.3
SHAPES, LARGEST = 200, 1 << 34
"""Layers, and the most multiply-adds that their dense product may have."""
SIZES, BATCHES = (256, 512, 1024, 2048, 4096, 8192), (1, 4, 16, 64, 256, 1024, 4096)
SPARSITIES, DTYPES = (0.5, 0.75, 0.9, 0.95, 0.99), ("float32", "bfloat16")
PATTERNS = {"any": 1, "fan-in": 1, "blocks": 64}
"""Where the nonzeros lie, and the side of their blocks."""


def grid(quick: bool, tiny: bool) -> list[dict[str, Any]]:
    """Layers drawn from the product of all settings."""
    sizes, batches = ((64, 128), (1, 4)) if tiny else (SIZES, BATCHES)
    names = ("out", "in", "batch", "sparsity", "dtype", "pattern")
    every = itertools.product(sizes, sizes, batches, SPARSITIES, DTYPES, PATTERNS)
    known: list[dict[str, Any]] = [
        dict(zip(names, one, strict=True)) for one in every if one[0] * one[1] * one[2] <= LARGEST
    ]
    drawn = random.Random(0).sample(known, min(SHAPES, len(known)))
    return drawn[: 3 if tiny else 20 if quick else SHAPES]


@torch.no_grad()
def measure(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `compare` returns of every candidate, "chosen" and "at_choice": {kernel: microseconds} as measured then."""
    weight, x = inputs(settings, device)
    exact = F.linear(x.double(), weight.double())
    with precision(False):
        choice = choose(problem(weight, x), x, weight)
        others = [name for name in choice.times_us if name != "dense"]
        dense = Rival("dense", lambda: [lambda: F.linear(x, weight)], (exact,))
        result = compare([dense, *(kernel(n, weight, x, None, exact) for n in others)], device, 0.15)
    return {**result, "chosen": choice.kernel.name, "at_choice": dict(choice.times_us)}


def inputs(settings: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and x [batch, in]."""
    generator = torch.Generator(device).manual_seed(0)
    dtype, block = getattr(torch, settings["dtype"]), PATTERNS[settings["pattern"]]
    rows, columns = settings["out"] // block, settings["in"] // block
    score = torch.rand(rows, columns, generator=generator, device=device)
    density = 1 - settings["sparsity"]
    if settings["pattern"] == "fan-in":
        kept = score.topk(max(1, round(density * columns)), 1).indices
        mask = torch.zeros_like(score).scatter_(1, kept, 1)
    else:
        mask = (score < density).float()
    mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    weight = normal(generator, *mask.shape) * mask
    x = normal(generator, settings["batch"], settings["in"])
    return weight.to(dtype), x.to(dtype)


def loss(result: Mapping[str, Any], times: str = "calls_us") -> tuple[float, float]:
    """Median time of the kernel taken over that of the fastest, and over that of the dense product."""
    medians = {name.removeprefix(OURS): s[2] for name, s in result[times].items()}
    taken = medians.get(result["chosen"], float("nan"))
    return taken / min(medians.values()), taken / medians.get("dense", float("nan"))
