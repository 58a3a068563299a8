"""Say what the zeros of every weight are: how many, and in which pattern."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse.formats import bsr, condensed, strided
from fxsparse.graph import fetch
from fxsparse.pattern import NM, Block, ConstantFanIn, Pattern, Strided, Unstructured
from fxsparse.pipeline import Decision, PassContext

_GROUPS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class DetectPattern:
    """Make a decision with nnz and pattern for every collected weight; one without zeros counts as unstructured."""

    name: ClassVar[str] = "detect-pattern"
    after: ClassVar[tuple[str, ...]] = ("collect-weights", "fold-masks", "fold-batch-norm")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Changes no graph, so it returns 0."""
        for name, spec in ctx.weights.items():
            if name in ctx.entries:
                _detect_in_entries(name, ctx)
                continue
            weight = fetch(gm, name).detach()
            mask = (weight.t() if spec.transposed else weight) != 0
            nnz = int(mask.sum())
            ctx.decisions[name] = Decision(detect(mask), 1 - nnz / max(1, mask.numel()), nnz)
            empty = int((mask.flatten(1).sum(1) == 0).sum())
            if empty:
                ctx.notes.append(f"{name}: {empty} of {len(mask)} rows are empty")
        return 0


def _detect_in_entries(name: str, ctx: PassContext) -> None:
    """Of nonzeros too few to show in blocks: strided, constant fan-in or none."""
    entries = ctx.entries[name]
    nnz = entries.values.numel()
    counts = torch.bincount(entries.indices[0], minlength=entries.shape[0])
    filled = counts[counts > 0]
    constant = len(filled) > 0 and bool((filled == filled[0]).all())
    pattern = Unstructured()
    if constant:
        m = strided.exact_strides(entries.indices[1], int(filled[0]), prod(entries.shape[1:]))
        pattern = ConstantFanIn(int(filled[0])) if m is None else Strided(m)
    ctx.decisions[name] = Decision(pattern, 1 - nnz / ctx.weights[name].numel, nnz)
    if len(filled) < len(counts):
        ctx.notes.append(f"{name}: {len(counts) - len(filled)} of {len(counts)} rows are empty")


def detect(mask: Tensor) -> Pattern:
    """The tightest pattern that a mask [out, in, ...] keeps: blocks, N:M, strided, constant fan-in, else none.

    Rows without any one do not count (ablated neurons).  N:M and those after it have to be met with equality, since
    almost every mask has at most some N ones in M.
    """
    rows = mask.flatten(1).any(1)
    if bool(mask.all()) or not bool(rows.any()):
        return Unstructured()
    if (block := bsr.block_of(mask)) != (1, 1):
        return Block(*block)
    filled = mask[rows]
    for size in _GROUPS:
        n = _ones_per_group(filled, size)
        if n is not None:
            return NM(n, size)
    k = condensed.fan_in(filled.flatten(1))
    if k is None:
        return Unstructured()
    m = strided.exact_strides(filled.flatten(1).nonzero()[:, 1], k, prod(mask.shape[1:]))
    return ConstantFanIn(k) if m is None else Strided(m)


def _ones_per_group(mask: Tensor, size: int) -> int | None:
    """The number of ones that every group of `size` input channels has; None where they differ or are all zeros."""
    if mask.shape[1] % size or mask.shape[1] == size:
        return None
    counts = mask.reshape(len(mask), mask.shape[1] // size, size, -1).sum(2)
    n = int(counts.flatten()[0])
    return n if n and bool((counts == n).all()) else None
