"""A torch.fx graph as JSON values and back: nodes with named functions, plain arguments, and no code."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo

from fxsparse import callees
from fxsparse.errors import CheckpointError
from fxsparse.flops.site_flops import Phases, SiteFlops
from fxsparse.sample_split import SampleSplit
from fxsparse.saved_checks import (
    expression_from_json,
    expression_to_json,
    structure_of,
    structure_text,
)

_NAMED = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}
"""Values that are attributes of torch."""
_PHASES = tuple(field.name for field in fields(Phases))
_ADVICE = "Pickle the module instead, or replace the call in the model's forward."


def to_json(graph: Graph) -> dict[str, Any]:
    """The graph as JSON values.

    Raises:
        CheckpointError: it calls a function that has no name in `callees`, or has an argument that is no plain value.
    """
    return {"nodes": [_node(node) for node in graph.nodes], "calling": _calling(graph._codegen)}


def from_json(row: Mapping[str, Any]) -> Graph:
    """What `to_json` was given; one of ``checkpoint.MALFORMED`` for anything else."""
    graph, made = Graph(), dict[str, Node]()
    for node in row["nodes"]:
        name = _identifier(node["name"])
        if name in made or (node["op"] == "output" and node is not row["nodes"][-1]):
            raise ValueError(f"a graph has the node {name!r} twice, or goes on after its output")
        args, kwargs = value(node["args"], made), value(node["kwargs"], made)
        target = _target(node, args)
        made[name] = new = graph.create_node(
            node["op"], target, tuple(args), {_identifier(key): item for key, item in kwargs.items()}, name
        )
        if new.name != name:
            raise ValueError(f"{name!r} cannot be the name of a node")
        if node.get("flops") is not None:
            new.meta["flops"] = _flops(node["flops"])
    graph.set_codegen(_codegen(row["calling"]))
    return graph


def _node(node: Node) -> dict[str, Any]:
    row = {
        "name": node.name,
        "op": node.op,
        "target": str(node.target),
        "args": plain(list(node.args), node.name),
        "kwargs": plain(dict(node.kwargs), node.name),
    }
    if node.op == "call_function":
        row["target"] = callees.name_of(node.target)
        if row["target"] is None:
            raise CheckpointError(
                f"save: the graph calls {node.target!r} ({node.name}), which a file cannot name: expected ops of "
                f"PyTorch and fxsparse. {_ADVICE}"
            )
    flops = node.meta.get("flops")
    return row if flops is None else row | {"flops": _flops_row(flops)}


def _target(node: Mapping[str, Any], args: list[Any]) -> str | Callable[..., Any]:
    op, target = node["op"], node["target"]
    if op == "call_function":
        found = callees.function_of(target)
        if found is getattr and not (len(args) == 2 and callees.is_attribute(args[1])):
            raise ValueError(f"a graph reads the attribute {args[1:]!r}")
        return found
    if op == "call_method" and not callees.is_method(target):
        raise ValueError(f"a graph calls the method {target!r}")
    if op not in ("placeholder", "get_attr", "call_module", "call_method", "output"):
        raise ValueError(f"a graph has a node of the kind {op!r}")
    for part in target.lstrip("*").split(".") if op != "output" else ():
        if not (part.isascii() and part.replace("_", "a").isalnum()) or part.startswith("__"):
            raise ValueError(f"a graph reads {target!r}")  # names become code
    return target


def plain(value: Any, where: str) -> Any:
    """An argument of the node `where` as JSON values: plain ones as they are, others as {its kind: its parts}."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [plain(item, where) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: plain(item, where) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [plain(item, where) for item in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, cls in _NAMED.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise CheckpointError(
        f"save: the graph gives {type(value).__name__} {value!r} to {where}, which a file cannot say: expected tensors "
        f"of the graph and plain values. {_ADVICE}"
    )


def value(row: Any, made: Mapping[str, Node]) -> Any:
    """What `plain` was given; `made`: the nodes by name."""
    if not isinstance(row, dict):
        if isinstance(row, list):
            raise TypeError("an argument is a bare list")
        return row
    [(kind, inside)] = row.items()
    if kind == "node":
        return made[inside]
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(value(item, made) for item in inside)
    if kind == "dict":
        return {str(key): value(item, made) for key, item in inside.items()}
    if kind == "slice":
        return slice(*(value(item, made) for item in inside))
    if kind == "ellipsis":
        return ...
    if kind == "complex":
        return complex(*inside)
    if kind == "device":
        return _device(inside)
    found = getattr(torch, inside)
    if not isinstance(found, _NAMED[kind]):
        raise TypeError(f"torch.{inside} is no {kind}")
    return found


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device") from error


def _flops_row(flops: SiteFlops) -> dict[str, Any]:
    columns = {"dense": flops.dense, "sparse": flops.sparse, "executed": flops.executed}
    return {"name": flops.name, "op": flops.op, "weight": flops.weight} | {
        key: {phase: expression_to_json(sympy.sympify(getattr(column, phase))) for phase in _PHASES}
        for key, column in columns.items()
    }


def _flops(row: Mapping[str, Any]) -> SiteFlops:
    phases = {
        key: Phases(*(expression_from_json(row[key][phase]) for phase in _PHASES))
        for key in ("dense", "sparse", "executed")
    }
    return SiteFlops(str(row["name"]), str(row["op"]), row["weight"], **phases)


def _identifier(name: str) -> str:
    if not (isinstance(name, str) and name.isidentifier() and name.isascii()) or name.startswith("__"):
        raise ValueError(f"expected a name in a graph, got {name!r}")
    return name


# -- how a graph is called ------------------------------------------------------------------------------------


def _calling(codegen: CodeGen) -> dict[str, Any] | None:
    if isinstance(codegen, SampleSplit):
        return {"samples": codegen.samples}
    if type(codegen) is CodeGen:
        return None
    if not isinstance(codegen, _PyTreeCodeGen):
        raise CheckpointError(f"save: the graph is called as {type(codegen).__name__} says. {_ADVICE}")
    info = codegen.pytree_info
    out = None if info.out_spec is None else structure_text(info.out_spec)
    return {"names": list(info.orig_args), "given": structure_text(info.in_spec), "result": out}


def _codegen(row: Mapping[str, Any] | None) -> CodeGen:
    if row is None:
        return CodeGen()
    if "samples" in row:
        if type(row["samples"]) is not int or row["samples"] < 1:
            raise ValueError(f"a graph is called with {row['samples']!r} samples at once")
        return SampleSplit(row["samples"])
    out = None if row["result"] is None else structure_of(row["result"])
    names = [_identifier(name) for name in row["names"]]
    return _PyTreeCodeGen(_PyTreeInfo(names, structure_of(row["given"]), out))
