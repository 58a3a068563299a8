"""What a rule may ask of a graph: an op's name whatever its spelling, its arguments, shapes and axes."""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.dropout import _DropoutNd

from fxsparse.channels.dependency import Axis, Tie
from fxsparse.graph import argument, canonical_names, fetch, operand_of
from fxsparse.operations import operation, without_underscore
from fxsparse.trace.modules import has_hooks

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.LeakyReLU: "leaky_relu", nn.ELU: "elu", nn.CELU: "celu",
    nn.SELU: "selu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Mish: "mish", nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid", nn.Hardtanh: "hardtanh", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
    nn.Softplus: "softplus", nn.Softsign: "softsign", nn.Identity: "identity", nn.Flatten: "flatten",
    nn.MaxPool1d: "max_pool1d", nn.MaxPool2d: "max_pool2d", nn.MaxPool3d: "max_pool3d",
    nn.AvgPool1d: "avg_pool1d", nn.AvgPool2d: "avg_pool2d", nn.AvgPool3d: "avg_pool3d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d", nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d", nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d", nn.AdaptiveMaxPool3d: "adaptive_max_pool3d",
    nn.LayerNorm: "layer_norm", nn.GroupNorm: "group_norm", nn.RMSNorm: "rms_norm",
    nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax",
}  # fmt: skip
_NOT_IN_ATEN = {
    "hardswish",
    "softsign",
    "logsigmoid",
    "tanhshrink",
    "contiguous",
    "identity",
    "float",
    "detach",
}
_ALIASES = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "slice", "select",
    "narrow", "getitem", "chunk", "split", "unbind", "squeeze", "unsqueeze", "expand", "expand_as", "view_as",
    "contiguous", "to", "float", "identity", "detach", "alias", "lift_fresh", "getattr",
}  # fmt: skip
"""Ops whose output may be memory of their first argument."""


@dataclass
class Reader:
    """One graph, and what is known of it so far as nodes are read in their order."""

    gm: GraphModule
    carried: set[Axis] = field(default_factory=set)
    """Axes of node outputs along which lie outputs of a linear layer or convolution."""

    def __post_init__(self) -> None:
        self._names = canonical_names(self.gm)

    def operation(self, node: Node) -> str | None:
        """Name of the op, the same for a module, a function, a method and its aten form; None for unknown ones."""
        if node.op == "call_module":
            module = self.module(node)
            if module is None or has_hooks(module):
                return None
            return "dropout" if isinstance(module, _DropoutNd) else _MODULES.get(type(module))
        name = getattr(node.target, "__name__", "")
        if name == "stochastic_depth":  # torchvision's, which need not be installed
            return "dropout"
        return operation(node)

    def module(self, node: Node) -> nn.Module | None:
        return self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None

    def setting(self, node: Node, position: int, name: str, default: Any = None) -> Any:
        """An argument of a call, or the attribute of that name where the call is of a module."""
        module = self.module(node)
        value = argument(node, position, name) if module is None else getattr(module, name, None)
        return default if value is None else value

    def shape(self, value: Any) -> tuple[Any, ...] | None:
        """Sizes of a node's tensor, symbols among them; None where it has none."""
        found = value.meta.get("val") if isinstance(value, Node) else None
        return tuple(map(_number, found.shape)) if isinstance(found, Tensor) else None

    def rank(self, value: Any) -> int:
        return len(self.shape(value) or ())

    def size(self, value: Any, dim: int) -> int | None:
        """Size of a dimension; None where it is a symbol, not known or not there."""
        shape = self.shape(value) or ()
        size = shape[dim] if -len(shape) <= dim < len(shape) else None
        return size if isinstance(size, int) else None

    def axis(self, value: Node, dim: int) -> Axis:
        """The axis of a node's output; a parameter's is the same for all nodes that read it."""
        dim %= max(1, self.rank(value))
        if value.op != "get_attr":
            return Axis(value, dim)
        return Axis(self.name(str(value.target)), dim)

    def name(self, name: str) -> str:
        """The first name of a parameter or buffer."""
        return self._names.get(name, name)

    def tensor(self, name: str) -> Tensor | None:
        value = fetch(self.gm, name)
        return value if isinstance(value, Tensor) else None

    def tie(self, a: Node, a_dim: int, b: Node, b_dim: int) -> list[Tie]:
        """One tie of whole axes; none where a size is a symbol, is not the same, or does not exist."""
        size = self.size(a, a_dim)
        if size is None or size != self.size(b, b_dim):
            return []
        return [Tie.whole(self.axis(a, a_dim), self.axis(b, b_dim), size)]

    def tie_tensor(self, name: str | None, node: Node, dim: int) -> list[Tie]:
        """Ties a vector of the module, by name, to a dimension of a node's output."""
        size = self.size(node, dim)
        return (
            []
            if name is None or size is None
            else [Tie.whole(Axis(self.name(name), 0), self.axis(node, dim), size)]
        )

    def overwritten(self, node: Node) -> list[Node]:
        """Values that a node changes in place although others read them, or memory of them."""
        if not self._in_place(node):
            return []
        chain, value = [], node.kwargs.get("out", argument(node, 0, "input"))
        while isinstance(value, Node):
            chain.append(value)
            aliases = value.op not in ("placeholder", "get_attr") and self.operation(value) in _ALIASES
            value = operand_of(value) if aliases else None
        return chain if any(len(value.users) > 1 or value.op == "get_attr" for value in chain) else []

    def is_fixed(self, value: Node) -> bool:
        """Whether a value is computed from parameters and buffers alone."""
        left, seen = [value], {value}
        while left:
            node = left.pop()
            if node.op != "get_attr" and (node.op == "placeholder" or not node.all_input_nodes):
                return False
            left += [read for read in node.all_input_nodes if read not in seen]
            seen.update(left)
        return True

    def _in_place(self, node: Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False))
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.is_mutable
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        reads_itself = name.startswith("i") and getattr(operator, name, None) is node.target
        told = "out" in node.kwargs or bool(node.kwargs.get("inplace"))
        return told or reads_itself or without_underscore(name) != name


def is_pointwise(name: str) -> bool:
    """Whether an entry of the output depends on the entries at the same place alone; in evaluation."""
    packet = getattr(torch.ops.aten, name, None)
    if name in _NOT_IN_ATEN:
        return True
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _number(size: int | torch.SymInt) -> int | torch.SymInt:
    """A symbol that the model fixed at a number is that number."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size)
    return size
