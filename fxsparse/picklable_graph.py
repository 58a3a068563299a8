"""Graphs that pickle: ops and built-in functions by name, and of the nodes' meta only what is plain."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph
from torch.fx.node import map_arg


def picklable(graph: Graph) -> Graph:
    """A copy that pickles, and is to be `restored` before it runs."""
    return _with_targets(graph, _named)


def restored(graph: Graph) -> Graph:
    """The graph that `picklable` was made of."""
    named = (_Overload, _Functional)
    return _with_targets(graph, lambda target: target() if isinstance(target, named) else target)


@dataclass(frozen=True)
class _Functional:
    """A function of torch.nn.functional by name: those such as max_pool2d do not pickle by themselves."""

    name: str

    def __call__(self) -> Any:
        return getattr(F, self.name)


@dataclass(frozen=True)
class _Overload:
    """An aten op by name, since ops themselves do not pickle; stands for it as the target of a node."""

    qualified: str
    overload: str

    def __call__(self) -> Any:
        namespace, _, name = self.qualified.partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), self.overload)


def _named(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return _Overload(target._schema.name, target._overloadname)
    if "<locals>" in getattr(target, "__qualname__", ""):
        return next((_Functional(name) for name, value in vars(F).items() if value is target), target)
    return target


def _with_targets(graph: Graph, change: Callable[[Any], Any]) -> Graph:
    """A copy with other targets and of the nodes' meta only what pickles."""
    copied, made = Graph(), {}
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = new = copied.create_node(
            node.op, change(node.target), args, kwargs, node.name, node.type
        )
        new.meta = {key: node.meta[key] for key in ("flops", "from_pass") if key in node.meta}
    copied.set_codegen(copy.deepcopy(graph._codegen))
    return copied
