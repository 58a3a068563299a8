"""Fuse a bias, a residual and an activation into the sparse kernel call before them."""

import inspect
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import kernel
from fxsparse.graph import argument, fetch, operand_of
from fxsparse.pipeline import PassContext

_PLAIN = {
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    torch.ops.aten.relu.default: "relu", torch.ops.aten.relu_.default: "relu",
    F.relu6: "relu6", torch.ops.aten.relu6.default: "relu6", torch.ops.aten.relu6_.default: "relu6",
    F.hardswish: "hardswish", torch.ops.aten.hardswish.default: "hardswish",
    torch.ops.aten.hardswish_.default: "hardswish",
    F.silu: "silu", torch.ops.aten.silu.default: "silu", torch.ops.aten.silu_.default: "silu",
}  # fmt: skip
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}
_GELUS = {F.gelu, torch.ops.aten.gelu.default}
_CLAMPS = {F.hardtanh, torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default}
_ADDS = {operator.add, torch.add, torch.ops.aten.add.Tensor}


@dataclass(frozen=True)
class FuseEpilogue:
    """kernel(x) + b, + residual, then an activation become arguments of the call where nothing else reads between.

    A residual has the shape and dtype of the result and is there before the call.
    A site that stays dense keeps its separate ops: the vendor's library and inductor do that part themselves.
    """

    name: ClassVar[str] = "fuse-epilogue"
    after: ClassVar[tuple[str, ...]] = ("lower-inference",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of fused ops."""
        entries = kernel.registered()
        # The training kernels fuse no activation; weights that no other kernel can pack are served by them.
        ops = {entry.run: entry.op for name, entry in entries.items() if name not in kernel.ALL_TRAINING}
        fused = 0
        for node in [node for node in gm.graph.nodes if node.op == "call_function" and node.target in ops]:
            # A vector added to images is one number a column, not one a channel.
            fused += _fuse_bias(gm, node) if ops[node.target] == "linear" else 0
            fused += _fuse_residual(node) + _fuse_activation(gm, node, ctx.notes)
        return fused


def activation_after(gm: GraphModule, node: Node) -> tuple[str, Node] | str:
    """The activation that alone reads `node`, by the name kernels know, with its node; else why there is none."""
    found = [(name, user) for user in node.users if (name := _activation(gm, user)) is not None]
    if not found:
        return "no activation that kernels know reads it"
    if len(node.users) > 1:
        return f"{found[0][1].name} is one of {len(node.users)} readers"
    return found[0]


def fused_activation(gm: GraphModule, node: Node) -> str:
    """What a kernel in the place of `node` is given as its activation."""
    found = activation_after(gm, node)
    return "none" if isinstance(found, str) else found[0]


def _fuse_activation(gm: GraphModule, node: Node, notes: list[str]) -> int:
    found = activation_after(gm, node)
    if isinstance(found, str):
        if len(node.users) > 1:
            notes.append(f"{node.name} keeps its output as it is: {found}")
        return 0
    node.kwargs = {**node.kwargs, "activation": found[0]}
    found[1].replace_all_uses_with(node)
    gm.graph.erase_node(found[1])
    return 1


def _fuse_bias(gm: GraphModule, node: Node) -> int:
    """``kernel(x) + b`` for a vector parameter b; the get_attr of b is moved before the kernel call."""
    user = next(iter(node.users), None)
    if (
        node.args[1] is not None
        or len(node.users) != 1
        or user is None
        or user.target not in _ADDS
        or user.kwargs
    ):
        return 0
    bias = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(bias, Node) or bias.op != "get_attr":
        return 0
    value = fetch(gm, str(bias.target))
    weight = node.args[2]
    while weight.op != "get_attr":  # type: ignore[union-attr]  # a dense kernel may read a transpose
        weight = operand_of(weight)  # type: ignore[arg-type]
    if value.dim() != 1 or value.dtype != fetch(gm, str(weight.target)).dtype:  # type: ignore[union-attr]
        return 0
    node.prepend(bias)
    node.args = (node.args[0], bias, *node.args[2:])
    user.replace_all_uses_with(node)
    gm.graph.erase_node(user)
    return 1


def _fuse_residual(node: Node) -> int:
    """``kernel(x) + residual`` where the residual is there already and nothing runs between that could change it."""
    user = next(iter(node.users), None)
    if (
        user is None
        or len(node.users) != 1
        or user is not _next_call(node)
        or user.target not in _ADDS
        or user.kwargs
    ):
        return 0
    residual = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(residual, Node) or not residual < node or not _same_kind(residual, node):
        return 0
    if "residual" not in inspect.signature(node.target).parameters:  # type: ignore[arg-type]
        return 0
    node.kwargs = {**node.kwargs, "residual": residual}
    user.replace_all_uses_with(node)
    node.graph.erase_node(user)
    return 1


def _next_call(node: Node) -> Node:
    following = node.next
    while following.op == "get_attr":
        following = following.next
    return following


def _same_kind(a: Node, b: Node) -> bool:
    """Whether both are tensors of one shape and dtype, as far as the example inputs show."""
    found = [node.meta.get("val") for node in (a, b)]
    tensors = [value for value in found if isinstance(value, torch.Tensor)]
    return len(tensors) == 2 and tensors[0].shape == tensors[1].shape and tensors[0].dtype == tensors[1].dtype


def _activation(gm: GraphModule, node: Node) -> str | None:
    if node.op == "call_module":
        return _module_activation(gm.get_submodule(str(node.target)))
    if node.op == "output":
        return None
    if node.target in _GELUS:
        return _gelu(node.kwargs.get("approximate", "none"))
    if node.target in _CLAMPS:
        return _clamp(*(argument(node, k, name) for k, name in ((1, "min_val"), (2, "max_val"))))
    return _PLAIN.get(node.target)


def _module_activation(module: nn.Module) -> str | None:
    if type(module) is nn.GELU:
        return _gelu(module.approximate)
    if type(module) is nn.Hardtanh:
        return _clamp(module.min_val, module.max_val)
    return _MODULES.get(type(module))


def _clamp(least: Any, most: Any) -> str | None:
    return "relu6" if (least, most) == (0, 6) else None


def _gelu(approximate: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
