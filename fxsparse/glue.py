"""Calls of ops without a weight that fxsparse has a form of its own for: how they are spelled in graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse.graph import fetch


@dataclass(frozen=True)
class GlueCall:
    """What a call passes on."""

    inputs: tuple[Node, ...]
    given: dict[str, Any]
    """The arguments that are no tensors, by name."""


@dataclass(frozen=True)
class GlueOp:
    """An op of torch and how to read calls of it."""

    name: str
    """As ``fxsparse.kernel.glue`` and, of tensors first and the rest by name, `plain` take it."""
    plain: Callable[..., Tensor]
    read: Callable[[GraphModule, Node], GlueCall | None]
    """None for another node, and for a call that asks for more than fxsparse's form does."""
    error: float = 0.0
    """Allowed difference from torch's result, relative to its largest magnitude."""


_WINDOW = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_POOLINGS = (F.max_pool2d, torch.max_pool2d, torch.ops.aten.max_pool2d.default)
_ATTENTIONS = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def _pooling(gm: GraphModule, node: Node) -> GlueCall | None:
    if node.op == "call_module":
        module = fetch(gm, str(node.target))
        if type(module) is not nn.MaxPool2d or module.return_indices or node.kwargs or len(node.args) != 1:
            return None
        return _call(node.args, {name: getattr(module, name) for name in _WINDOW})
    if node.op != "call_function" or node.target not in _POOLINGS or not node.args:
        return None
    given = dict(zip(_WINDOW, node.args[1:], strict=False)) | dict(node.kwargs)
    if given.pop("return_indices", False) or not set(given) <= set(_WINDOW):
        return None
    if given.get("stride") == []:
        del given["stride"]
    return _call(node.args[:1], given)


def _attention(gm: GraphModule, node: Node) -> GlueCall | None:
    if node.op != "call_function" or node.target not in _ATTENTIONS:
        return None
    given = dict(zip(_ATTENTION, node.args, strict=False)) | dict(node.kwargs)
    if (
        given.pop("dropout_p", 0.0) != 0.0
        or given.pop("enable_gqa", False)
        or not set(given) <= set(_ATTENTION)
    ):
        return None
    mask = given.pop("attn_mask", None)
    tensors = [given.pop(name, None) for name in _ATTENTION[:3]]
    return _call(tensors if mask is None else [*tensors, mask], given)


def _call(inputs: Any, given: dict[str, Any]) -> GlueCall | None:
    """None where an input is no tensor of the graph, or the graph computes another argument."""
    if not all(isinstance(value, Node) for value in inputs):
        return None
    return (
        None if any(isinstance(value, Node) for value in given.values()) else GlueCall(tuple(inputs), given)
    )


GLUE = (
    GlueOp("max_pool2d", F.max_pool2d, _pooling),
    # Scores of some size turn the last bits of sums of products into this much of the weights.
    GlueOp("scaled_dot_product_attention", F.scaled_dot_product_attention, _attention, error=1e-5),
)
