"""The gradient of a convolution's weight, in row tiles or at some of its entries, from what a backward left behind."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernels.csr import patches
from fxsparse.kernels.csr.conv import as_images, window
from fxsparse.kernels.csr.sampled import row_index
from fxsparse.kernels.library import COMPILED

Seen = tuple[Tensor, Tensor, Mapping[str, Any]]
"""Input and output gradient of one backward, and the call's stride, padding, dilation and groups."""


def conv_gradient_tiles(seen: Sequence[Seen], shape: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Row tiles (first row, [rows, fan-in]) of the dense gradient of a weight of `shape`, summed over what was `seen`.

    A tile has at most 1/16 of the rows (at least one), all of one group.
    """
    limit = max(1, shape[0] // 16)
    images = [_images(*one, shape) for one in seen]
    for group_rows in range(0, shape[0], own := shape[0] // images[0][2][10]):
        for first in range(group_rows, group_rows + own, limit):
            last = min(first + limit, group_rows + own)
            total = None
            for x, grad, numbers in images:
                tile = _tile(x, grad, numbers, first, last, shape)
                total = tile if total is None else total.add_(tile)
            assert total is not None, "a weight that was not probed has no gradient"
            yield first, total


def conv_gradient_at(seen: Sequence[Seen], positions: Tensor, shape: Sequence[int]) -> Tensor:
    """The same gradient at flat `positions` (int64 [n], ascending): [n], in at least fp32.

    Time and memory grow with the pixels and with n; nothing has the size of the weight.
    """
    crow, cols = row_index(positions, (shape[0], torch.Size(shape[1:]).numel()))
    total = None
    for one in seen:
        x, grad, numbers = _images(*one, shape)
        run = torch.ops.fxsparse.csr_conv_sample.default if x.dtype in COMPILED else patches.conv_sample
        part = run(grad, x, crow, cols, numbers)
        total = part if total is None else total.add_(part)
    assert total is not None, "a weight that was not probed has no gradient"
    return total


def _images(
    x: Tensor, grad: Tensor, arguments: Mapping[str, Any], shape: Sequence[int]
) -> tuple[Tensor, Tensor, list[int]]:
    dimensions = len(shape) - 2
    numbers = window(shape[2:], shape[1] * arguments.get("groups", 1), **arguments)
    return as_images(x, dimensions)[0], as_images(grad, dimensions)[0], numbers


def _tile(
    x: Tensor, grad: Tensor, numbers: Sequence[int], first: int, last: int, shape: Sequence[int]
) -> Tensor:
    """Rows first to last, [rows, fan-in]: the gradient of a convolution that has these outputs alone."""
    channels = shape[1]
    group = first // (shape[0] // numbers[10])
    top, left, bottom, right = numbers[4:8]
    part = F.pad(x[:, group * channels : (group + 1) * channels], (left, right, top, bottom))
    rows = x.new_empty(()).expand(last - first, channels, *numbers[:2])
    tile = torch.ops.aten.convolution_backward(
        grad[:, first:last], part, rows, None, numbers[2:4], [0, 0], numbers[8:10], False, [0, 0], 1,
        [False, True, False],
    )[1]  # fmt: skip
    return tile.flatten(1)
