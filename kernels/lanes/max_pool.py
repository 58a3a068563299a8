"""Max pooling without indices on images in lanes; for inference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxsparse.kernel import register_glue
from fxsparse.kernels.lanes.layout import LANES, reference_from_lanes, reference_to_lanes
from fxsparse.kernels.library import define, refuse_gradient
from fxsparse.kernels.pool import max_pool


@register_glue
def max_pool_lanes(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    grid: int,
) -> Tensor:
    """`max_pool2d` of the images that x has in lanes (`lanes.layout`), with the result in lanes, too; fp32.

    With a `grid` above 1 the output has to be as large as the input divided by the stride, in whole parts.

    Raises:
        UnsupportedError: `x` requires a gradient.
        RuntimeError: an output that the grid does not fit.
    """
    refuse_gradient(x)
    size = grid * x.shape[2], grid * x.shape[3]
    numbers = max_pool.window(size, kernel_size, stride, padding, dilation, ceil_mode)
    return torch.ops.fxsparse.max_pool_lanes.default(x, numbers, grid)


def reference(x: Tensor, window: Sequence[int], grid: int) -> Tensor:
    """The op in plain PyTorch."""
    return reference_to_lanes(max_pool.reference(reference_from_lanes(x, grid), window), grid)


def _fake(x: Tensor, window: Sequence[int], grid: int) -> Tensor:
    return x.new_empty(*x.shape[:2], window[8] // grid, window[9] // grid, LANES)


define("max_pool_lanes(Tensor x, int[] window, int grid) -> Tensor", reference, _fake)
