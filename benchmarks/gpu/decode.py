"""Decoding: 4,096 outputs of 14,336 inputs in bf16 at 90 %, batch 1 to 8, weights from memory.

Every rival has so many copies of its weight that they are four times as large as the L2, and takes one after the other.
The limit is the bytes that a kernel must read and write at the measured bandwidth of the memory ("of DRAM"): values and
indices as packed, x and y.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import Call
from benchmarks.gpu.rivals import OURS, Rival, chosen, compare, csr32, kernel, normal
from benchmarks.gpu.roofs import bytes_per_second, copies
from fxsparse.kernel import registered

SECONDS = 12.0
KERNELS = ("cuda-condensed", "cuda-csr")


def grid(quick: bool, tiny: bool) -> list[dict[str, Any]]:
    """A cell for each batch."""
    shape = {"out": 12, "in": 33, "fan_in": 3} if tiny else {"out": 4096, "in": 14336, "fan_in": 1434}
    return [{**shape, "batch": batch} for batch in ((1, 2) if tiny else (1, 8) if quick else (1, 2, 4, 8))]


@torch.no_grad()
def measure(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `compare` returns, and "limits": {"DRAM": {rival: microseconds}}, "bytes" of weights, "copies" of them."""
    generator = torch.Generator(device).manual_seed(0)
    out, width, fan_in = settings["out"], settings["in"], settings["fan_in"]
    columns = normal(generator, out, width).topk(fan_in, 1).indices
    weight = torch.zeros(out, width, device=device).scatter_(1, columns, normal(generator, out, fan_in))
    weight, x = weight.bfloat16(), normal(generator, settings["batch"], width).bfloat16()
    exact = F.linear(x.double(), weight.double())
    taken = chosen(weight, x)
    held = {"dense": weight.nbytes, "cuSPARSE CSR": int(weight.count_nonzero()) * 6 + 4 * (out + 1)}
    for name in KERNELS:
        buffers = registered()[name].pack(weight).values()
        held[OURS + name] = sum(t.nbytes for t in buffers)
    many = {name: copies(size, device) for name, size in held.items()}
    ours = [kernel(name, weight, x, None, exact, many[OURS + name]) for name in KERNELS]
    result = compare([*rivals(x, weight, exact, many), *ours], device)
    rates = bytes_per_second(device)
    moved = {name: size + x.nbytes + exact.numel() * 2 for name, size in held.items()}
    limits = {"DRAM": {name: 1e6 * size / rates["DRAM"] for name, size in moved.items()}}
    extra = {"chosen": taken, "bytes": held, "copies": many, "limits": limits, "bytes_per_second": rates}
    return {**result, **extra}


def rivals(x: Tensor, weight: Tensor, exact: Tensor, many: Mapping[str, int]) -> list[Rival]:
    """The dense product and torch's CSR."""

    def over(weights: list[Tensor]) -> list[Call]:
        return [lambda weight=weight: F.linear(x, weight) for weight in weights]

    def dense() -> list[Call]:
        return over([weight.clone() for _ in range(many["dense"])])

    def sparse() -> list[Call]:
        return over([csr32(weight) for _ in range(many["cuSPARSE CSR"])])

    return [Rival("dense", dense, (exact,)), Rival("cuSPARSE CSR", sparse, (exact,))]
