"""How example inputs are written, and what a forward makes of them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxsparse.errors import TraceError

CPU = torch.device("cpu")
"""Where tensors on meta are created unless a device is named."""


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of a call.

    A tensor is the only argument; a tuple or list holds the positional arguments, and a dict at its end the keyword
    arguments; a dict (or what a tokenizer returns) alone is all keyword arguments.  A model that takes a dict by
    position needs ``(batch, {})``.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, (tuple, list)):
        raise TraceError(
            f"example_inputs must be a tensor, a dict, or a tuple whose last element may be a dict of "
            f"keyword arguments; got {type(example_inputs).__name__}"
        )
    if example_inputs and isinstance(example_inputs[-1], dict):
        return tuple(example_inputs[:-1]), dict(example_inputs[-1])
    return tuple(example_inputs), {}


def named_arguments(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Example values by parameter name of the model's forward; TraceError where the forward would not take
    them.
    """
    args, kwargs = split_inputs(example_inputs)
    signature = inspect.signature(type(model).forward)
    try:
        return dict(signature.bind(model, *args, **kwargs).arguments)
    except TypeError as error:
        raise TraceError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}; pass a "
            f"tensor, or a tuple of the positional arguments with a dict of keyword arguments at its end"
        ) from error


def has_meta(value: Any) -> bool:
    """Whether a nested value or a module holds a tensor on meta."""
    if isinstance(value, nn.Module):
        return any(t.is_meta for t in (*value.parameters(), *value.buffers()))
    return any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in pytree.tree_leaves(value))


def on_device(root: nn.Module, default: torch.device) -> torch.device:
    """Where tensors on meta are taken to be: with the module's other parameters, else at the default."""
    return next((p.device for p in root.parameters() if not p.is_meta), default)


def stand_in(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """A fake tensor, or Parameter, of the same shape and strides without memory; on `device` for one on meta."""
    with mode, torch.no_grad():
        fake = torch.empty_strided(
            tensor.shape,
            tensor.stride(),
            dtype=tensor.dtype,
            device=device if tensor.is_meta else tensor.device,
        )
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def has_sequence(tensor: Tensor) -> bool:
    """Whether dimension 1 of an input is taken for a sequence: ``[batch, sequence, features]`` or integer
    tokens.
    """
    return tensor.dim() == (3 if tensor.is_floating_point() else 2)


def to_json(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Example inputs as JSON values: structure and plain values, and of tensors only shape and dtype.

    A tensor that came before says which one it is, of `seen` so far.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        if id(value) in seen:
            return {"same": seen[id(value)]}
        seen[id(value)] = len(seen)
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [to_json(item, seen) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_json(item, seen) for key, item in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    return {"opaque": type(value).__name__}


def from_json(row: Any, made: list[Tensor] | None = None) -> Any:
    """Example inputs on meta from what `to_json` wrote; TraceError where they held more than it can say."""
    made = [] if made is None else made
    [kind, inside], *_ = row.items()
    if kind == "tensor":
        made.append(torch.empty(inside, dtype=getattr(torch, row["dtype"]), device="meta"))
        return made[-1]
    if kind == "same":
        return made[inside]
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(from_json(item, made) for item in inside)
    if kind == "dict":
        return {key: from_json(item, made) for key, item in inside.items()}
    if kind == "value":
        return inside
    raise TraceError(f"the saved example inputs hold a {inside}, which only example_inputs= can give")


def drawn(example_inputs: Any, device: torch.device) -> Any:
    """Inputs like these on `device`: normal where the dtype is floating, else zeros; the global generator stays."""
    generator, made = torch.Generator().manual_seed(0), dict[int, Tensor]()

    def like(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in made:
            kind = leaf.dtype
            values = (
                torch.randn(leaf.shape, generator=generator)
                if kind.is_floating_point
                else torch.zeros(leaf.shape)
            )
            made[id(leaf)] = values.to(device, kind)
        return made[id(leaf)]

    return pytree.tree_map(like, example_inputs)
