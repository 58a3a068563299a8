"""Max pooling without indices, for inference."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernel import register_glue
from fxsparse.kernels.library import define, refuse_gradient


@register_glue
def max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``F.max_pool2d`` of the same arguments, for x [..., height, width]; without a gradient.

    Raises:
        UnsupportedError: `x` requires a gradient.
    """
    refuse_gradient(x)
    if x.dtype != torch.float32:
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    numbers = window(x.shape[-2:], kernel_size, stride, padding, dilation, ceil_mode)
    return torch.ops.fxsparse.max_pool(x, numbers)


def window(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """10 numbers: kernel, stride, padding, dilation and the size of the output, each height and width."""
    kernel = _pair(kernel_size)
    steps, pads, gaps = _pair(kernel_size if stride is None else stride), _pair(padding), _pair(dilation)
    out = [
        _out(length, *numbers, ceil_mode)
        for length, *numbers in zip(size, kernel, steps, pads, gaps, strict=True)
    ]
    return [*kernel, *steps, *pads, *gaps, *out]


def _pair(number: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(number, int):
        return number, number
    first, *rest = number
    return first, rest[0] if rest else first


def _out(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    # The last window has to start inside the input or the padding before it.
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def reference(x: Tensor, window: Sequence[int]) -> Tensor:
    """The same in plain PyTorch; rows and columns past the padded input are -inf."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), (oh, ow) = (window[i : i + 2] for i in range(0, 10, 2))
    height, width = x.shape[-2:]
    below = max(0, (oh - 1) * sh + (kh - 1) * dh + 1 - ph - height)
    right = max(0, (ow - 1) * sw + (kw - 1) * dw + 1 - pw - width)
    images = F.pad(x.reshape(-1, 1, height, width), (pw, right, ph, below), value=-torch.inf)
    y = F.max_pool2d(images, (kh, kw), (sh, sw), 0, (dh, dw))[..., :oh, :ow]
    return y.reshape(*x.shape[:-2], oh, ow)


def _fake(x: Tensor, window: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-2], *window[8:])


define("max_pool(Tensor x, int[] window) -> Tensor", reference, _fake)
