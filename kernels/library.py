"""The op library "fxsparse" and the activations that every sparse linear can fuse."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""The fused epilogues; an op takes the position in this tuple."""

_LIBRARY = torch.library.Library("fxsparse", "FRAGMENT")


def activate(y: Tensor, activation: str) -> Tensor:
    """`y` after the named activation, in plain PyTorch."""
    if activation == "none":
        return y
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return getattr(F, activation)(y)


def activation_code(activation: str) -> int:
    """Position of `activation` in ACTIVATIONS; ValueError with the allowed names otherwise."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected an activation of {ACTIVATIONS}, got {activation!r}")
    return ACTIVATIONS.index(activation)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag) -> None:
    """Register ``fxsparse::<schema>`` with its PyTorch `reference` for every device, and its `fake`.

    On CPU the first call builds and loads the C++ kernels; once they are there the dispatcher calls them and never
    the reference again.  Where they cannot be built the reference runs, and ``kernels.cpu.availability`` says why.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        from fxsparse.kernels import cpu

        if args[0].is_cpu and cpu.implements(name) and cpu.load():
            return getattr(torch.ops.fxsparse, name)(*args)
        return reference(*args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fxsparse::{name}", fake, lib=_LIBRARY)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The floating tensors in the autocast dtype where autocast is on for their device, else as they are."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
