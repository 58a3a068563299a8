"""Blocks in bf16, 4,096 x 4,096 weights at 90 % and 4,096 tokens: forward, and forward + backward.

torch's Triton kernel multiplies x^T from the left; it gets x as it is ("x^T as a view") and, better for it, transposed
beforehand, and of a few launch settings the fastest beside its own.  The limit is that of the dense product's rate for
the blocks' share of its FLOPs ("of dense rate").
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import FAILURES, Call, Ready, times
from benchmarks.gpu.rivals import OURS, Rival, chosen, compare, kernel, normal, triton_errors
from fxsparse.formats import bsr
from fxsparse.kernel import registered

SECONDS = 15.0
DENSITY = 0.1
_METAS = ((64, 4, 3), (128, 4, 3), (128, 8, 3), (128, 8, 4))
"""Columns of a tile, warps and stages that torch's Triton kernel is tried with."""


def grid(quick: bool, tiny: bool) -> list[dict[str, Any]]:
    """Blocks of 64 first."""
    size = {"size": 256, "tokens": 32} if tiny else {"size": 4096, "tokens": 4096}
    blocks = (16, 32) if tiny else (64,) if quick else (64, 32, 128, 16)
    return [{"block": block, **size, "backward": backward} for block in blocks for backward in (False, True)]


@torch.no_grad()
def measure(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `compare` returns, and "limits": {"dense rate": {kernel: microseconds}}, "density" of the weight."""
    generator = torch.Generator(device).manual_seed(0)
    size, block = settings["size"], settings["block"]
    kept = torch.rand(size // block, size // block, generator=generator, device=device).flatten()
    kept = torch.zeros_like(kept).index_fill_(0, kept.topk(max(1, round(DENSITY * len(kept)))).indices, 1)
    mask = kept.view(size // block, -1).repeat_interleave(block, 0).repeat_interleave(block, 1).bfloat16()
    weight = normal(generator, size, size).bfloat16() * mask
    x = normal(generator, settings["tokens"], size).bfloat16()
    taken = chosen(weight, x, training=settings["backward"])
    if settings["backward"]:
        upstream = normal(generator, len(x), size).bfloat16()
        found = compare(_training(x, weight, mask, upstream), device)
    else:
        found = compare(_forward(x, weight, block), device)
    density, dense = float(kept.mean()), found["us"].get("dense", found["calls_us"]["dense"])[2]
    limit = {name: dense * density for name in found["us"] if name.startswith(OURS)}
    return {**found, "chosen": taken, "density": density, "limits": {"dense rate": limit}}


def _forward(x: Tensor, weight: Tensor, block: int) -> list[Rival]:
    exact = F.linear(x.double(), weight.double())

    def cusparse(dtype: torch.dtype) -> list[Call]:
        blocked, inputs = weight.to(dtype).to_sparse_bsr(block), x.to(dtype)
        return [lambda: F.linear(inputs, blocked)]

    return [
        Rival("dense", lambda: [lambda: F.linear(x, weight)], (exact,)),
        Rival("torch BSR", partial(cusparse, torch.bfloat16), (exact,)),
        Rival("torch BSR fp32", partial(cusparse, torch.float32), (exact,)),
        Rival("torch Triton, x^T as a view", lambda: _torch_triton(weight, x.t(), block), (exact.t(),)),
        Rival("torch Triton", lambda: _torch_triton(weight, x.t().contiguous(), block, _METAS), (exact.t(),)),
        kernel("cuda-bsr", weight, x, None, exact),
    ]


def _training(x: Tensor, weight: Tensor, mask: Tensor, upstream: Tensor) -> list[Rival]:
    """Gradients of x and of the weight: the whole one, that under a mask, and that of the blocks."""
    whole = upstream.double().t() @ x.double()
    exact = upstream.double() @ weight.double()
    entry = registered()["cuda-bsr-train"]
    inputs, dense = x.detach().requires_grad_(), weight.detach().requires_grad_()

    def blocks() -> list[Call]:
        values, *index = entry.pack(weight).values()
        values.requires_grad_()

        def run() -> Sequence[Tensor]:
            with torch.enable_grad():
                y = entry.run(inputs, None, values, *index, in_features=weight.shape[1])
                return torch.autograd.grad(y, (inputs, values), upstream)

        return [run]

    def see(grads: Sequence[Tensor]) -> Sequence[Tensor]:
        packed = entry.pack(weight)
        in_blocks = grads[1][packed["to_blocks"].long()]
        return grads[0], bsr.to_dense(in_blocks, packed["crow"], packed["columns"], packed["dense"])

    def linear(masked: bool) -> list[Call]:
        def run() -> Sequence[Tensor]:
            with torch.enable_grad():
                y = F.linear(inputs, dense * mask if masked else dense)
                return torch.autograd.grad(y, (inputs, dense), upstream)

        return [run]

    return [
        Rival("dense", lambda: linear(False), (exact, whole), tuple),
        Rival("masked dense", lambda: linear(True), (exact, whole * mask), tuple),
        Rival(f"{OURS}cuda-bsr-train", blocks, (exact, whole * mask), see),
    ]


def _torch_triton(
    weight: Tensor, x_t: Tensor, block: int, metas: Sequence[tuple[int, ...]] = ()
) -> list[Call]:
    """``torch.sparse._triton_ops.bsr_dense_addmm`` with its own settings, or the fastest of these.

    Raises:
        RuntimeError: a CPU, which it does not run on.
    """
    if not x_t.is_cuda:
        raise RuntimeError("torch's Triton kernel runs on CUDA devices")
    from torch.sparse._triton_ops import bsr_dense_addmm

    blocked = weight.to_sparse_bsr(block)
    nothing = x_t.new_zeros(len(weight), x_t.shape[1])

    def call(meta: dict[str, int] | None) -> Tensor:
        return bsr_dense_addmm(nothing, blocked, x_t, beta=0, meta=meta)

    tried = {"its own": partial(call, None)}
    for columns, warps, stages in metas:
        meta = {"SPLIT_N": max(1, x_t.shape[1] // columns), "GROUP_SIZE_ROW": 4}
        run = partial(call, {**meta, "num_warps": warps, "num_stages": stages})
        try:
            run()
        except (*FAILURES, *triton_errors()):  # a tile that is too large for the device
            continue
        tried[f"{columns} {warps} {stages}"] = run
    found = times({name: Ready([run]) for name, run in tried.items()}, x_t.device, 0.1).calls_us
    return [tried[min(found, key=lambda name: found[name][2])]]
