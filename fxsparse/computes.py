"""A digest of what a captured model computes: one model's file is not for another of equal shapes."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from fxsparse.graph import fetch
from fxsparse.pipeline import Program


def digest(program: Program) -> str:
    """Of the graphs of all modes as a front end made them, or of the tree of classes where there are none.

    The same for values, devices and names of nodes that differ; numbers in the graph count, values of tensors do not.
    """
    lines = _tree(program.skeleton) if program.tier == "walk" else _graphs(program)
    found = hashlib.blake2b(digest_size=16)
    for line in lines:
        found.update(line.encode() + b"\n")
    return found.hexdigest()


def _graphs(program: Program) -> Iterator[str]:
    for mode, gm in sorted(program.graphs.items()):
        yield mode
        yield from _nodes(gm.graph, program.skeleton)


def _nodes(graph: Graph, root: nn.Module) -> Iterator[str]:
    numbers = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        yield f"{node.op} {_target(node)} {_said(node.args, numbers)} {_said(node.kwargs, numbers)}"
        if node.op == "call_module":
            yield _class(fetch(root, str(node.target)))
        elif node.op == "get_attr" and isinstance(
            region := fetch(root, str(node.target)), torch.fx.GraphModule
        ):
            yield from _nodes(region.graph, region)


def _target(node: Node) -> str:
    target: Any = node.target
    if node.op == "get_attr" and target.startswith(("_constant_", "_region_")):
        return "constant"  # numbered by their values, which are not there on meta
    if isinstance(target, str) or not hasattr(target, "__qualname__"):
        return str(target) if isinstance(target, str | torch._ops.OperatorBase) else type(target).__qualname__
    return target.__qualname__


def _said(value: Any, numbers: dict[Node, int]) -> str:
    if isinstance(value, Node):
        return f"%{numbers[value]}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_said(item, numbers) for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_said(item, numbers)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_said((value.start, value.stop, value.step), numbers)}"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    return "device" if isinstance(value, torch.device) else type(value).__qualname__


def _tree(skeleton: nn.Module) -> Iterator[str]:
    return (f"{path} {_class(module)}" for path, module in skeleton.named_modules(remove_duplicate=False))


def _class(module: nn.Module) -> str:
    """The name of its class, with the options of PyTorch's own; a user's may say anything, values among it."""
    cls = type(module)
    plain = cls.__module__.startswith("torch.nn.") and not isinstance(
        module, nn.ParameterList | nn.ParameterDict
    )
    return f"{cls.__qualname__}({module.extra_repr() if plain else ''})"
