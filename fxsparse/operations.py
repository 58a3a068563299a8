"""An op's name, the same for a function, a method of tensors and its aten form."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import HigherOrderOperator
from torch.fx import Node

_SPELLINGS = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div", "subtract": "sub",
    "multiply": "mul", "divide": "div", "concat": "cat", "concatenate": "cat", "numpy_T": "t",
    "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim", "sym_size": "size",
    "_unsafe_view": "view", "split_with_sizes": "split", "_assert": "assert", "linalg_matmul": "matmul",
    "imatmul": "matmul",
}  # fmt: skip
_PLACES = (torch, F, operator, torch.linalg, torch.sparse)


def operation(node: Node) -> str | None:
    """Name of the op that a node calls; None for a module and for what is no op of PyTorch."""
    if node.op == "call_method":
        return spelled(str(node.target))
    if node.op != "call_function":
        return None
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return spelled(target._schema.name.removeprefix("aten::")) if target.namespace == "aten" else None
    name = getattr(target, "__name__", "")
    if target is getattr or isinstance(target, HigherOrderOperator):
        return name
    short = name.removeprefix("_").removeprefix("sparse_").removeprefix("linalg_")
    ours = any(target is getattr(place, known, None) for place in _PLACES for known in (name, short))
    return spelled(name) if ours else None


def spelled(name: str) -> str:
    """The first of several spellings of an op, without the underscore of its in-place form."""
    return _SPELLINGS.get(without_underscore(name), without_underscore(name))


def without_underscore(name: str) -> str:
    """The name without the underscore of the in-place form."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
