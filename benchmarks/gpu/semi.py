"""2:4 in bf16 for large products: torch's two kernels for it, and ours for any N:M, against dense ones."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from benchmarks.gpu.clock import Call
from benchmarks.gpu.rivals import Rival, chosen, compare, kernel, normal
from fxsparse.pattern import NM

SECONDS = 12.0


def grid(quick: bool, tiny: bool) -> list[dict[str, Any]]:
    """Square products."""
    return [{"size": size} for size in ((64,) if tiny else (4096,) if quick else (4096, 8192))]


@torch.no_grad()
def measure(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What `compare` returns, with 2:4 by magnitude."""
    size = settings["size"]
    generator = torch.Generator(device).manual_seed(0)
    weight, x = (normal(generator, size, size) for _ in range(2))
    weight = (weight * NM(2, 4).project(weight.abs(), 0)).bfloat16()
    x = x.bfloat16()
    exact = F.linear(x.double(), weight.double())
    taken = chosen(weight, x)
    ours = kernel("cuda-nm", weight, x, None, exact)
    return {**compare([*rivals(x, weight, exact), ours], device), "chosen": taken}


def rivals(x: Tensor, weight: Tensor, exact: Tensor) -> list[Rival]:
    """The dense product, cuSPARSELt as it comes and with the algorithm that its search finds, and CUTLASS."""

    def searched() -> list[Call]:
        packed: Any = SparseSemiStructuredTensorCUSPARSELT.from_dense(weight)
        packed.alg_id_cusparselt = int(torch._cslt_sparse_mm_search(packed.packed, x.t()))
        return [lambda: F.linear(x, packed)]

    def packed_by(kind: Any) -> list[Call]:
        packed = kind.from_dense(weight)
        return [lambda: F.linear(x, packed)]

    return [
        Rival("dense", lambda: [lambda: F.linear(x, weight)], (exact,)),
        Rival("cuSPARSELt", partial(packed_by, SparseSemiStructuredTensorCUSPARSELT), (exact,)),
        Rival("cuSPARSELt, searched", searched, (exact,)),
        Rival("CUTLASS", partial(packed_by, SparseSemiStructuredTensorCUTLASS), (exact,)),
    ]
