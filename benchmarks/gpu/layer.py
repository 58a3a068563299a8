"""SRigL's layer, 3,072 to 768 at 90 % (arXiv:2305.02299, section 4.3), fp32 without TF32, batch 256.

Everything counts that a caller would pay: transposing x, putting the outputs where the active rows are.  All of it lies
in the L2 cache, for every rival alike.  The kernels' limit is that of their gathers: every nonzero reads one input of
every sample, nonzeros x batch x 4 bytes, at the measured bandwidth of the L2 ("of L2"; what a tile of tokens keeps in
the L1 can come faster) and at the most that the L1s deliver ("of L1").
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import layer_methods
from benchmarks.gpu.clock import Call, precision
from benchmarks.gpu.rivals import OURS, Rival, chosen, compare, csr32, kernel
from benchmarks.gpu.roofs import bytes_per_second

SECONDS = 12.0
KERNELS = ("cuda-condensed", "cuda-csr")


def grid(quick: bool, tiny: bool) -> list[dict[str, Any]]:
    """The layer with 318 active rows and the one without ablation."""
    shapes = [(5, 7, 12, 33), (12, 3, 12, 33)] if tiny else [(318, 741, 768, 3072), (768, 307, 768, 3072)]
    batches = (4,) if tiny else (256,)
    names = ("rows", "fan_in", "out", "in")
    return [dict(zip(names, shape, strict=True), batch=batch) for batch in batches for shape in shapes]


@torch.no_grad()
def measure(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `compare` returns, and "limits": {"L2", "L1": {kernel: microseconds}}."""
    torch.manual_seed(0)
    rows, fan_in, out, width = (settings[name] for name in ("rows", "fan_in", "out", "in"))
    weight, bias = (t.to(device) for t in layer_methods.layer(rows, fan_in, torch.float32, out, width))
    x = torch.randn(settings["batch"], width).to(device)
    exact = F.linear(x.double(), weight.double(), bias.double())
    with precision(False):
        taken = chosen(weight, x, bias)
        ours = [kernel(name, weight, x, bias, exact) for name in KERNELS]
        result = compare([*rivals(x, weight, bias, exact), *ours], device)
    gathered = rows * fan_in * settings["batch"] * 4
    rates = bytes_per_second(device)
    limits = {
        level: {OURS + name: 1e6 * gathered / rates[level] for name in KERNELS}
        for level in ("L2", "L1")
        if level in rates
    }
    return {**result, "chosen": taken, "limits": limits, "bytes_per_second": rates}


def rivals(x: Tensor, weight: Tensor, bias: Tensor, exact: Tensor) -> list[Rival]:
    """Everything but our kernels, dense fp32 first; those in bf16 get their input and weight in it."""
    halves = [t.bfloat16() for t in (x, weight, bias)]
    rounded = F.linear(*(t.double() for t in halves))
    active = weight.any(1)
    short, short_bias, place = weight[active], bias[active], active.nonzero().squeeze(1)

    def scattered() -> Tensor:
        return bias.repeat(len(x), 1).index_copy_(1, place, F.linear(x, short, short_bias))

    def sparse() -> list[Call]:
        csr = csr32(weight)
        return [lambda: F.linear(x, csr, bias)]

    def transposed() -> list[Call]:
        csr = csr32(weight)
        return [lambda: (csr @ x.t()).t() + bias]

    def gather(run: Any) -> list[Call]:
        columns = short.ne(0).nonzero()[:, 1].view(len(short), -1)
        values = short.gather(1, columns)
        return [lambda: run(x, values, columns, short_bias)]

    few = (exact[:, active],)
    return [
        Rival("dense", lambda: [lambda: F.linear(x, weight, bias)], (exact,)),
        Rival("dense tf32", lambda: [lambda: F.linear(x, weight, bias)], (exact,), tf32=True),
        Rival("dense bf16", lambda: [lambda: F.linear(*halves)], (rounded,)),
        Rival("structured", lambda: [lambda: F.linear(x, short, short_bias)], few),
        Rival("structured, scattered", lambda: [scattered], (exact,)),
        Rival("cuSPARSE CSR", sparse, (exact,)),
        Rival("cuSPARSE CSR @ x^T", transposed, (exact,)),
        Rival("gather", lambda: gather(layer_methods.gathered), few),
        Rival("gather compiled", lambda: gather(layer_methods.compiled(layer_methods.gathered)), few),
    ]
