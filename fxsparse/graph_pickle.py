"""Graphs whose targets do not pickle, in a form that does."""

import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph
from torch.fx.node import map_arg


@dataclass(frozen=True)
class _Function:
    """A function of PyTorch by name: those such as max_pool2d and unique do not pickle by themselves."""

    module: str
    name: str

    def __call__(self) -> Any:
        return getattr(import_module(self.module), self.name)


@dataclass(frozen=True)
class _Region:
    """An op on graphs, such as cond, by name."""

    name: str

    def __call__(self) -> Any:
        return getattr(torch.ops.higher_order, self.name)


@dataclass(frozen=True)
class _Overload:
    """Any other op by name, since ops themselves do not pickle; stands for it as the target of a node."""

    qualified: str
    overload: str

    def __call__(self) -> Any:
        namespace, _, name = self.qualified.partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), name), self.overload)


def picklable(graph: Graph) -> Graph:
    """A copy of `graph` that pickles; `restored` makes it run."""
    return _with_targets(graph, _named)


def restored(graph: Graph) -> Graph:
    """A copy of what `picklable` returned that runs."""
    named = (_Overload, _Region, _Function)
    return _with_targets(graph, lambda target: target() if isinstance(target, named) else target)


def _named(target: Any) -> Any:
    if isinstance(target, OpOverload):
        return _Overload(target._schema.name, target._overloadname)
    if isinstance(target, HigherOrderOperator):
        return _Region(target.name())
    if "<locals>" in getattr(target, "__qualname__", ""):
        places = ((module, name) for module in (F, torch) for name in vars(module))
        found = (_Function(m.__name__, name) for m, name in places if getattr(m, name) is target)
        return next(found, target)
    return target


def _with_targets(graph: Graph, change: Any) -> Graph:
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
