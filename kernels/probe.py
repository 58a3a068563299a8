"""What an armed backward leaves behind for the next mask update, and the gradients that are read off it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxsparse.kernels.library import define

PROBES: dict[int, list[tuple[Tensor, Tensor]]] = {}
"""For each probe key one (input, gradient of the output) per armed backward, in order of the micro-batches."""


def stash(x: Tensor, grad: Tensor, key: int) -> Tensor:
    """Append copies of `x` and `grad` to ``PROBES[key]`` and return `grad` copied.

    The copy that comes back is what backward goes on with: it keeps the op alive in compiled graphs.
    """
    return torch.ops.fxsparse.stash_probe(x, grad, key)


def watch(y: Tensor, x: Tensor, key: int) -> Tensor:
    """`y`, an op's output for the input `x`; backward stashes `x` and the gradient of `y` under `key`."""
    return _Watch.apply(y, x, key)


def gradient_tiles(
    pairs: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int], rows_per_tile: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Row tiles (first row, [rows, in]) of a linear layer's dense weight gradient, ``sum of grad_y^T x``.

    Micro-batches are added one after the other, as autograd accumulates.  A tile has `rows_per_tile` rows, by
    default and at most 1/16 of them (at least one).  `shape` is (out, in); `pairs` are at least one (x, grad_y).
    """
    out_features = shape[0]
    limit = max(1, out_features // 16)
    rows = limit if rows_per_tile is None else min(rows_per_tile, limit)
    flat = list(flattened(pairs))
    for first in range(0, out_features, rows):
        tile = None
        for x, grad in flat:
            product = grad[:, first : first + rows].t() @ x  # [rows, in]
            tile = product if tile is None else tile.add_(product)
        assert tile is not None, "a weight that was not probed has no gradient"
        yield first, tile


def flattened(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of a linear layer as matrices (x [tokens, in], grad_y [tokens, out])."""
    return ((x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])) for x, grad in pairs)


def clear(key: int) -> None:
    """Forget what was stashed under `key`."""
    PROBES.pop(key, None)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, key: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.key = key
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return stash(x, grads[0], ctx.key), None, None


def _stash(x: Tensor, grad: Tensor, key: int) -> Tensor:
    pair = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in (x, grad))
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
