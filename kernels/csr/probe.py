"""The dense-gradient probe of compact layers: what an armed backward leaves behind, and its row tiles."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxsparse.kernels.library import define

PROBES: dict[int, list[tuple[Tensor, Tensor]]] = {}
"""For each probe key one (x [N, in], grad_y [N, out]) per armed backward, in order of the micro-batches."""


def stash(x: Tensor, grad: Tensor, key: int) -> Tensor:
    """Append copies of `x` and `grad` to ``PROBES[key]`` and return `grad` copied.

    The copy that comes back is what backward goes on with: it keeps the op alive in compiled graphs.
    """
    return torch.ops.fxsparse.stash_probe(x, grad, key)


def gradient_tiles(
    key: int, shape: tuple[int, int], rows_per_tile: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Row tiles (first row, [rows, in]) of the dense weight gradient, ``sum of grad_y^T x``.

    Micro-batches are added one after the other, as autograd accumulates.  A tile has `rows_per_tile` rows, by
    default and at most 1/16 of them (at least one).  `shape` is (out, in); KeyError if nothing was stashed.
    """
    out_features = shape[0]
    limit = max(1, out_features // 16)
    rows = limit if rows_per_tile is None else min(rows_per_tile, limit)
    pairs = PROBES[key]
    for first in range(0, out_features, rows):
        tile = None
        for x, grad in pairs:
            product = grad[:, first : first + rows].t() @ x  # [rows, in]
            tile = product if tile is None else tile.add_(product)
        assert tile is not None
        yield first, tile


def clear(key: int) -> None:
    """Forget what was stashed under `key`."""
    PROBES.pop(key, None)


def _stash(x: Tensor, grad: Tensor, key: int) -> Tensor:
    pair = tuple(
        t.detach().reshape(-1, t.shape[-1]).clone(memory_format=torch.contiguous_format) for t in (x, grad)
    )
    PROBES.setdefault(key, []).append(pair)  # pyright: ignore[reportArgumentType]
    return grad.clone(memory_format=torch.contiguous_format)


def _stash_fake(x: Tensor, grad: Tensor, key: int) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


# Tagged as random so that no compiler merges two calls that look equal: each one is a side effect.
define(
    "stash_probe(Tensor x, Tensor grad, int key) -> Tensor",
    _stash,
    _stash_fake,
    torch.Tag.nondeterministic_seeded,
)
