"""The op library "fxsparse" and the activations that every sparse linear can fuse."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from fxsparse.errors import UnsupportedError
from fxsparse.kernels.gpu.needs import DTYPES

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish")
"""The fused epilogues; an op takes the position in this tuple."""

COMPILED = (torch.float32, torch.bfloat16)
"""The dtypes that the C++ kernels take; others run in plain PyTorch on the CPU."""

_LIBRARY = torch.library.Library("fxsparse", "FRAGMENT")


def is_compiled(x: Tensor) -> bool:
    """Whether there is compiled code for the dtype of `x` where it is; elsewhere plain PyTorch runs."""
    return x.dtype in COMPILED or (x.is_cuda and x.dtype in DTYPES)


def activate(y: Tensor, activation: str) -> Tensor:
    """`y` after the named activation, in plain PyTorch."""
    if activation == "none":
        return y
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return getattr(F, activation)(y)


def scattered(
    y: Tensor, active_rows: Tensor, empty_rows: Tensor, bias: Tensor | None, activation: int
) -> Tensor:
    """[..., out] with the columns of `y` [..., active] at active_rows and ``activation(bias)`` at empty_rows."""
    idle = y.new_zeros(len(empty_rows)) if bias is None else bias[empty_rows.long()]
    idle = activate(idle, ACTIVATIONS[activation]).to(y.dtype).expand(*y.shape[:-1], -1)
    order = torch.argsort(torch.cat([active_rows, empty_rows]))
    return torch.cat([y, idle], -1)[..., order]


def activation_code(activation: str) -> int:
    """Position of `activation` in ACTIVATIONS; ValueError with the allowed names otherwise."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {ACTIVATIONS}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def with_epilogue(
    run: Callable[..., Tensor],
    x: Tensor,
    weight: tuple[Any, ...],
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    """``run(x, *weight, bias, code, residual, scales)``; a residual of another dtype (autocast) is added after.

    The weight is its values, of which there may be a gradient, and their places.
    """
    code = activation_code(activation)
    refuse_gradient(x, bias, residual, weight[0])
    narrow = () if scales is None else (scales,)
    if residual is None:
        return run(x, *weight, bias, code, None, *narrow) if narrow else run(x, *weight, bias, code)
    if residual.dtype == x.dtype:
        return run(x, *weight, bias, code, residual, *narrow)
    return activate(run(x, *weight, bias, 0, None, *narrow) + residual, activation)


def dense_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, residual: Tensor | None = None
) -> Tensor:
    """``activation(x @ weight^T + bias + residual)`` in plain PyTorch: computed in the weight's dtype, given in x's."""
    y = F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    y = y if residual is None else y + residual.to(weight.dtype)
    return activate(y, ACTIVATIONS[activation]).to(x.dtype)


def wants_gradient(*given: Tensor | None) -> bool:
    """Whether somebody wants a gradient through one of these, in reverse or in forward mode."""
    reverse, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    if not reverse and not forward:
        return False
    levels: Sequence[Tensor | None] = given
    if peek_interpreter_stack() is not None and not torch.compiler.is_compiling():
        levels = [level for x in given if x is not None for level in _levels(x)]
    for x in levels if reverse else ():  # any() takes twice as long
        if x is not None and x.requires_grad:
            return True
    return forward and any(x is not None and _has_tangent(x) for x in levels)


def _levels(x: Tensor) -> Iterator[Tensor]:
    """What x is for every transform of torch.func that is at work: vmap hides those around it."""
    while _functorch.is_functorch_wrapped_tensor(x):
        yield x
        x = _functorch.get_unwrapped(x)
    yield x


def _has_tangent(x: Tensor) -> bool:
    return not _functorch.is_batchedtensor(x) and forward_ad.unpack_dual(x).tangent is not None


def refuse_gradient(*given: Tensor | None) -> None:
    """Raise UnsupportedError where somebody wants a gradient through an inference kernel, which has none."""
    if wants_gradient(*given):
        raise UnsupportedError(
            "an inference kernel got an input, or a weight or bias, that requires a gradient: expected none, as it has "
            "no backward and no forward-mode derivative. Run it under torch.no_grad() and outside of forward-mode "
            "differentiation, or differentiate the training module or to_dense()."
        )


def check_input(x: Tensor, values: Tensor, in_features: int, scales: Tensor | None = None) -> None:
    """Raise RuntimeError, as the dense op does, unless x is [..., in_features] of the weight's dtype.

    That is the dtype of `values`, or of `scales` where they have those.  References and fakes call it; ``check_input``
    of tensors.h says the same.
    """
    values = values if scales is None else scales
    if x.dtype != values.dtype or x.dim() == 0 or x.shape[-1] != in_features:
        raise RuntimeError(
            f"fxsparse: expected x [..., {in_features}] in {_name(values.dtype)} as the weight is, got "
            f"{list(x.shape)} in {_name(x.dtype)}"
        )


def check_images(x: Tensor, typed: Tensor, channels: int) -> None:
    """Raise RuntimeError, as the dense op does, unless x is [samples, channels, height, width] of the dtype of `typed`.

    References and fakes call it; ``check_images`` of window.h says the same.
    """
    if x.dtype != typed.dtype or x.dim() != 4 or x.shape[1] != channels:
        raise RuntimeError(
            f"fxsparse: expected images of {channels} channels in {_name(typed.dtype)} as the weight is, got "
            f"{list(x.shape)} in {_name(x.dtype)}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag) -> None:
    """Register ``fxsparse::<schema>`` with its PyTorch `reference` for every device, and its `fake`.

    On CPU the first call builds and loads the C++ kernels; once they are there the dispatcher calls them and
    never the reference again.  Where they cannot be built the reference runs, and
    ``kernels.cpu.availability`` says why.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        from fxsparse.kernels import cpu

        x = args[0] if isinstance(args[0], Tensor) else args[0][0]
        strided = x.layout == torch.strided  # the C++ kernels are for no other
        if x.is_cpu and strided and cpu.builds_for(name) and cpu.load():
            return getattr(torch.ops.fxsparse, name)(*args)
        return reference(*args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxsparse::{name}", fake, lib=_LIBRARY)


def in_order(args: Sequence[Any]) -> list[Any]:
    """The same with all tensors contiguous, as Triton kernels read them; of strides they know those of the input."""
    return [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]


def check_added(y: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise RuntimeError, as ``output`` of tensors.h does, unless bias is [outputs] and residual like the result y."""
    if bias is not None and (bias.shape != (outputs,) or not bias.is_floating_point()):
        raise RuntimeError(
            f"fxsparse: expected bias [{outputs}], got {list(bias.shape)} in {_name(bias.dtype)}"
        )
    if residual is not None and (residual.shape != y.shape or residual.dtype != y.dtype):
        raise RuntimeError(
            f"fxsparse: expected a residual of the output's shape, with {outputs} features, and of x's dtype, got "
            f"{list(residual.shape)} in {_name(residual.dtype)}"
        )


def on_gpu(name: str, run: Callable[..., Any]) -> None:
    """Let ``fxsparse::<name>`` on CUDA tensors call `run`, which imports its Triton kernels when it is called.

    It runs on the device of its first argument, whichever is the current one.  Where Triton is not installed the
    reference runs.
    """

    def there(*args: Any) -> Any:
        with torch.cuda.device(args[0].device):  # Triton launches on the current device
            return run(args[0], *in_order(args[1:]))

    if importlib.util.find_spec("triton") is not None:
        _LIBRARY.impl(name, there, "CUDA")


def autocast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in the autocast dtype where autocast is on for their device, else as they are.

    As for dense ops, an x of fp64 or of integers is left alone: its dtype is refused later.
    """
    # x.device.type makes two objects and a string: a quarter of a microsecond of a call of four.
    if not torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return x, values, bias
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x, values, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)


def autocast_stored(
    x: Tensor, values: Tensor, scales: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`autocast` for the values of an inference kernel: those with scales stay as they are stored."""
    if not torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return x, values, scales, bias
    if scales is None:
        x, values, bias = autocast(x, values, bias)
    else:
        x, scales, bias = autocast(x, scales, bias)
    return x, values, scales, bias
