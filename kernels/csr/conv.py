"""Convolutions with a CSR weight: forward, gradients at the stored coordinates, and their kernel entry.

The weight is the matrix [out, in / groups * kernel] with the flat positions of the dense weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import csr
from fxsparse.kernel import TRAINING, Cost, Entries, Kernel, Problem, register
from fxsparse.kernels import cpu, probe
from fxsparse.kernels.csr import patches
from fxsparse.kernels.library import COMPILED, autocast, check_images, define


def csr_conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: Sequence[int],
    in_channels: int,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    probe_key: int = -1,
) -> Tensor:
    """``F.conv2d(x, W, bias, stride, padding, dilation, groups)`` with W [out, in / groups, *kernel_size] in CSR.

    A `kernel_size` of one number makes it ``F.conv1d``.  x [samples, in_channels, *size], or one sample without the
    first dimension, and values [capacity] are of one floating dtype; crow [out + 1] and cols [capacity] are int32,
    columns flat in [in / groups, *kernel_size].  Sums are in fp32 (fp64 for fp64).  Differentiable in x, values and
    bias; no tensor of W's size and no patches of all pixels are made.  With ``probe_key >= 0`` backward leaves
    copies of x and the output gradient in ``probe.PROBES[probe_key]``.

    Raises:
        RuntimeError: an x of other channels or another dtype than the weight's.
        ValueError: an x of too few or too many dimensions, or smaller with its padding than the kernel.
    """
    x, values, bias = autocast(x, values, bias)
    numbers = window(kernel_size, in_channels, stride, padding, dilation, groups)
    check_size(x, kernel_size, numbers)
    return _CsrConv.apply(x, values, crow, cols, bias, numbers, len(kernel_size), probe_key)


def check_size(x: Tensor, kernel_size: Sequence[int], window: Sequence[int]) -> None:
    """Raise ValueError unless x has the dimensions of images, batched or not, and the kernel fits into it."""
    sizes = "length" if len(kernel_size) == 1 else "height, width"
    if x.dim() - len(kernel_size) not in (1, 2):
        raise ValueError(
            f"fxsparse: expected x [samples, {window[11]}, {sizes}] or [{window[11]}, {sizes}], got {list(x.shape)}"
        )
    if min(patches.output_size(as_images(x, len(kernel_size))[0].shape[2:], window)) < 1:
        raise ValueError(f"a kernel of {list(kernel_size)} is larger than the padded input {list(x.shape)}")


def window(
    kernel_size: Sequence[int],
    in_channels: int,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> list[int]:
    """12 numbers: kernel, stride, padding before, padding after, dilation (each height and width), groups, channels.

    One dimension is a height of 1.
    """
    dimensions = len(kernel_size)
    strides, dilations = _each(stride, dimensions), _each(dilation, dimensions)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
        before = [t // 2 for t in total]
        after = [t - b for t, b in zip(total, before, strict=True)]
    else:
        before = after = _each(0 if padding == "valid" else padding, dimensions)  # type: ignore[arg-type]
    fill = ((1, kernel_size), (1, strides), (0, before), (0, after), (1, dilations))
    numbers = [number for idle, given in fill for number in [idle] * (2 - dimensions) + list(given)]
    return [*numbers, groups, in_channels]


def as_images(x: Tensor, dimensions: int) -> tuple[Tensor, list[int]]:
    """X as [samples, in, height, width], and which dimensions of size 1 that has in addition, in order."""
    added = [0] if x.dim() == dimensions + 1 else []
    added += [2] if dimensions == 1 else []
    for dimension in added:
        x = x.unsqueeze(dimension)
    return x, added


def as_given(images: Tensor, added: Sequence[int]) -> Tensor:
    """`images` without the dimensions that `as_images` added."""
    for dimension in reversed(added):
        images = images.squeeze(dimension)
    return images


class _CsrConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, crow, cols, bias, numbers, dimensions, probe_key):
        ctx.save_for_backward(x, values, crow, cols)
        ctx.numbers, ctx.dimensions, ctx.probe_key = numbers, dimensions, probe_key
        run: Any = torch.ops.fxsparse.csr_conv_forward.default if x.dtype in COMPILED else patches.conv
        images, added = as_images(x, dimensions)
        return as_given(run(images, values, crow, cols, bias, numbers), added)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, values, crow, cols = ctx.saved_tensors
        need_x, need_values, need_bias = (ctx.needs_input_grad[i] for i in (0, 1, 4))
        if ctx.probe_key >= 0:
            grad = probe.stash(x, grad, ctx.probe_key)
        (grad, _), (x, added) = as_images(grad, ctx.dimensions), as_images(x, ctx.dimensions)
        exact = x.dtype not in COMPILED
        run: Any = patches.conv_backward if exact else torch.ops.fxsparse.csr_conv_backward.default
        grad_x, grad_values = run(grad, x, values, crow, cols, ctx.numbers, need_x, need_values)
        return (
            as_given(grad_x, added) if need_x else None,
            grad_values if need_values else None,
            *(None,) * 2,
            grad.sum((0, 2, 3)) if need_bias else None,
            *(None,) * 3,
        )


def _each(number: int | Sequence[int], dimensions: int) -> list[int]:
    return [number] * dimensions if isinstance(number, int) else list(number) * (dimensions // len(number))


def _forward_fake(x, values, crow, cols, bias, window):
    check_images(x, values, window[11])
    return x.new_empty(x.shape[0], crow.shape[0] - 1, *patches.output_size(x.shape[2:], window))


def _backward_fake(grad, x, values, crow, cols, window, need_x, need_values):
    return x.new_empty(x.shape if need_x else (0,)), values.new_empty(values.shape if need_values else (0,))


def _sample_fake(grad, x, crow, cols, window):
    return grad.new_empty(cols.shape, dtype=torch.float32)


_WEIGHT = "Tensor crow, Tensor cols"
define(
    f"csr_conv_forward(Tensor x, Tensor values, {_WEIGHT}, Tensor? bias, int[] window) -> Tensor",
    patches.conv,
    _forward_fake,
)
define(
    f"csr_conv_backward(Tensor grad, Tensor x, Tensor values, {_WEIGHT}, int[] window, bool need_x, "
    "bool need_values) -> (Tensor, Tensor)",
    patches.conv_backward,
    _backward_fake,
)
define(
    f"csr_conv_sample(Tensor grad, Tensor x, {_WEIGHT}, int[] window) -> Tensor",
    patches.conv_sample,
    _sample_fake,
)


# Formulas see shapes only, so they count every slot of the capacity.
@register_flop_formula(torch.ops.fxsparse.csr_conv_forward)
def _forward_flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * values_shape[0] * x_shape[0] * torch.Size(patches.output_size(x_shape[2:], args[-1])).numel()


@register_flop_formula(torch.ops.fxsparse.csr_conv_backward)
def _backward_flops(grad_shape, x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return sum(args[-2:]) * 2 * values_shape[0] * grad_shape[0] * torch.Size(grad_shape[2:]).numel()


@register_flop_formula(torch.ops.fxsparse.csr_conv_sample)
def _sample_flops(grad_shape, x_shape, crow_shape, cols_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * cols_shape[0] * grad_shape[0] * torch.Size(grad_shape[2:]).numel()


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    matrix = weight.flatten(1)
    index = csr.from_mask(matrix != 0)
    return {"values": csr.values_of(matrix, index), "crow": index.crow, "cols": index.cols}


def _pack_entries(entries: Entries) -> Mapping[str, Tensor]:
    rows, cols = entries.indices
    return {"values": entries.values, "crow": csr.pointers(rows, entries.shape[0]), "cols": cols}


def csr_conv_train(x, bias, values, crow, cols, activation: str = "none", **arguments: Any) -> Tensor:
    """`csr_conv2d` in the argument order of ``Kernel.run``; `arguments` are its keywords."""
    return csr_conv2d(x, values, crow, cols, bias, **arguments)


def _reference(
    x, bias, values, crow, cols, activation: str = "none", probe_key: int = -1, **arguments: Any
) -> Tensor:
    images, added = as_images(x, len(arguments["kernel_size"]))
    return as_given(patches.conv(images, values, crow, cols, bias, window(**arguments)), added)


def _refuses(problem: Problem) -> list[str]:
    return cpu.refuses(problem) + ([] if problem.training else ["it is for training"])


def _cost(problem: Problem) -> Cost:
    return Cost(6 * problem.batch * problem.nnz, problem.nnz * (problem.dtype.itemsize + 4))


CSR_CONV_TRAIN = register(
    Kernel(
        TRAINING["conv2d"],
        "conv2d",
        "csr",
        _pack,
        csr_conv_train,
        _reference,
        _refuses,
        _cost,
        _pack_entries,
    )
)
