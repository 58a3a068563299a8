"""Convolutions with a CSR weight in plain PyTorch: the oracle of the C++ kernels, and what runs without them.

A weight is the matrix [out, in / groups * kernel] whose flat positions are those of the dense [out, in / groups,
*kernel].  A few output rows at a time become patches, which the CSR products take as tokens.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernels.csr import reference
from fxsparse.kernels.library import check_images

_PATCHED = 1 << 20
"""Entries of patches that are made at once (at least one output row of one sample)."""


def conv(
    x: Tensor, values: Tensor, crow: Tensor, cols: Tensor, bias: Tensor | None, window: Sequence[int]
) -> Tensor:
    """The convolution of x [samples, in, height, width]; `window` is `conv.window`."""
    check_images(x, values, window[11])
    rows = crow.numel() - 1
    cols = _columns(crow, cols, x.shape[1], window)
    y = x.new_empty(x.shape[0], rows, *output_size(x.shape[2:], window))
    for part, patches, _ in _patches(x, y, window):
        product = reference.product(patches, values.to(patches.dtype), crow, cols, bias, 0)
        part.copy_(product.view(len(part), *part.shape[2:], rows).movedim(3, 1))
    return y


def conv_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    window: Sequence[int],
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and values (at the stored coordinates, else 0); empty where one is not needed."""
    cols = _columns(crow, cols, x.shape[1], window)
    top, left, bottom, right = window[4:8]
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(values.shape if need_values else (0,), dtype=wide, device=x.device)
    padded = x.new_zeros(
        *x.shape[:2], x.shape[2] + top + bottom, x.shape[3] + left + right, dtype=wide
    ) if need_x else None  # fmt: skip
    none = crow.new_empty(0)
    for part, patches, place in _patches(x, grad, window):
        upstream = part.movedim(1, 3).reshape(len(patches), -1)
        grad_patches, grad_values, _ = reference.linear_backward(
            upstream, patches, values, crow, cols, none, none, none, need_x, need_values, False
        )
        if need_values:
            sums += grad_values
        if padded is not None:
            into = padded[place]
            columns = grad_patches.to(wide).view(len(part), -1, grad_patches.shape[1]).transpose(1, 2)
            into += F.fold(columns, into.shape[2:], window[:2], window[8:10], 0, window[2:4])
    grad_x = x.new_empty(0)
    if padded is not None:
        inside = padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        grad_x = inside.to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return grad_x, sums.to(values.dtype)


def conv_sample(grad: Tensor, x: Tensor, crow: Tensor, cols: Tensor, window: Sequence[int]) -> Tensor:
    """The weight gradient at the entries of a CSR index, [n], in at least fp32."""
    cols = _columns(crow, cols, x.shape[1], window)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = torch.zeros(cols.shape, dtype=wide, device=x.device)
    for part, patches, _ in _patches(x, grad, window):
        sums += reference.sampled_product(part.movedim(1, 3).reshape(len(patches), -1), patches, crow, cols)
    return sums


def output_size(size: Sequence[int], window: Sequence[int]) -> list[int]:
    """Height and width of the output."""
    kernel, stride, before, after, dilation = (window[i : i + 2] for i in range(0, 10, 2))
    return [
        (size[d] + before[d] + after[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)
    ]


def _patches(
    x: Tensor, y: Tensor, window: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, tuple[slice, ...]]]:
    """(part of y, its patches [pixels, in * kernel], where they lie in the padded x), a few output rows at a time."""
    kernel, stride, dilation = window[:2], window[2:4], window[8:10]
    top, left, bottom, right = window[4:8]
    samples, (height, width) = y.shape[0], y.shape[2:]
    each = x.shape[1] * kernel[0] * kernel[1] * width
    rows = max(1, min(height, _PATCHED // max(1, each)))
    taken = max(1, _PATCHED // max(1, each * rows))
    for n in range(0, samples, taken):
        padded = F.pad(x[n : n + taken], (left, right, top, bottom))
        for first in range(0, height, rows):
            last = min(first + rows, height)
            span = slice(first * stride[0], (last - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1)
            unfolded = F.unfold(padded[:, :, span], kernel, dilation, 0, stride)
            place = (slice(n, n + taken), slice(None), span)
            yield y[n : n + taken, :, first:last], unfolded.transpose(1, 2).flatten(0, 1), place


def _columns(crow: Tensor, cols: Tensor, channels: int, window: Sequence[int]) -> Tensor:
    """Columns in patches of all channels: a row reads those of its group."""
    groups = window[10]
    if groups == 1:
        return cols
    rows, own, unused = reference.entries(crow, cols)
    fan_in = channels // groups * window[0] * window[1]
    return (own + rows // max(1, (crow.numel() - 1) // groups) * fan_in).masked_fill(unused, -1).int()
