"""Graphs in a form that pickles, whatever they call and however long they are."""

import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate, map_arg


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


@dataclass(frozen=True)
class _Place:
    """A node in the arguments of another, by its place in the graph."""

    index: int


@dataclass(frozen=True)
class FlatGraph:
    """A graph as rows: nodes refer to their neighbours, so that pickling them takes a level of recursion for each."""

    nodes: tuple[tuple[Any, ...], ...]
    """(op, target, args, kwargs, name, type, meta) of each, in order."""
    codegen: CodeGen


def picklable(graph: Graph) -> FlatGraph:
    """What `graph` is, in a form that pickles, with of the nodes' meta only what does; `restored` makes it run."""
    places: dict[Any, Any] = {node: _Place(index) for index, node in enumerate(graph.nodes)}
    rows = []
    for node in graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), places.__getitem__)
        meta = {key: node.meta[key] for key in ("flops", "from_pass") if key in node.meta}
        rows.append((node.op, _named(node.target), args, kwargs, node.name, node.type, meta))
    return FlatGraph(tuple(rows), copy.deepcopy(graph._codegen))


def restored(flat: FlatGraph) -> Graph:
    """The graph that `picklable` was given."""
    graph, made = Graph(), []

    def node_at(leaf: Any) -> Any:
        return made[leaf.index] if isinstance(leaf, _Place) else leaf

    for op, target, args, kwargs, name, kind, meta in flat.nodes:
        target = target() if isinstance(target, _Overload | _Region | _Function) else target
        args, kwargs = map_aggregate((args, kwargs), node_at)
        made.append(graph.create_node(op, target, args, kwargs, name, kind))
        made[-1].meta = dict(meta)
    graph.set_codegen(copy.deepcopy(flat.codegen))
    return graph


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
