"""The modules that an inference graph calls, in a file: their plain settings, and graphs that passes added."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule
from torch.nn.modules.conv import _ConvNd

from fxsparse import graph_json
from fxsparse.errors import CheckpointError
from fxsparse.graph import fetch, owner
from fxsparse.lane_region import LaneRegion, Stage
from fxsparse.saved_calls import check_calls

_PLAIN = (bool, int, float, str)


def settings(skeleton: nn.Module, graph: Graph | None) -> dict[str, Any]:
    """{path: plain attributes} of the modules that `graph` calls, or of all; sizes of layers always."""
    inner = [
        path for path, module in skeleton.named_modules() if isinstance(module, LaneRegion | GraphModule)
    ]
    called = set() if graph is None else set(_called(skeleton, graph))
    return {
        path: _plain(module)
        for path, module in skeleton.named_modules(remove_duplicate=False)
        if (graph is None or path in called or isinstance(module, nn.Linear | _ConvNd))
        and not any(path == other or path.startswith(f"{other}.") for other in inner)
    }


def put_settings(rows: Mapping[str, Any], shell: nn.Module) -> None:
    """Give modules the attributes that they had.

    Raises:
        CheckpointError: one has no attribute of that name.
    """
    for path, row in rows.items():
        module = shell.get_submodule(path)
        known = _plain(module)
        for name, value in row.items():
            if name not in known:
                raise CheckpointError(
                    f"expected {path!r} to have {name!r}; pass the model that was compiled."
                )
            module.__dict__[name] = graph_json.value(value, {})


def regions(skeleton: nn.Module) -> dict[str, Any]:
    """{path: graphs} of the modules that passes and traces added."""
    found: dict[str, Any] = {}
    for path, module in skeleton.named_modules():
        if any(path.startswith(f"{other}.") for other in found):
            continue
        if isinstance(module, LaneRegion):
            found[path] = {
                "plain": graph_json.to_json(module.plain.graph),
                "at_once": module.at_once,
                "size": list(module.size),
                "stages": [
                    [*plan, graph_json.to_json(piece.graph)]  # type: ignore[union-attr]
                    for plan, piece in zip(module.plan, module.pieces, strict=True)
                ],
            }
        elif isinstance(module, GraphModule):
            found[path] = {"graph": graph_json.to_json(module.graph)}
    return found


def put_regions(rows: Mapping[str, Any], shell: nn.Module) -> None:
    """Add them to the tree, whose leaves they call."""
    for path, row in rows.items():
        holder, leaf = owner(shell, path)
        if "graph" in row:
            holder._modules.pop(leaf, None)
            holder.add_module(leaf, _module(row["graph"], shell))
            continue
        stages = [
            Stage(int(samples), int(grid), _module(graph, shell)) for samples, grid, graph in row["stages"]
        ]
        at_once = None if row["at_once"] is None else int(row["at_once"])
        holder.add_module(leaf, LaneRegion(_module(row["plain"], shell), at_once, stages, row["size"]))


def check_region_calls(graph: Graph, shell: nn.Module) -> None:
    """As `check_calls`, in every region, whose inputs are what `graph` gives to it."""
    for node in graph.find_nodes(op="call_module"):
        region = fetch(shell, str(node.target))
        if not isinstance(region, LaneRegion):
            continue
        given = [
            arg.target if isinstance(arg, type(node)) and arg.op == "get_attr" else None for arg in node.args
        ]
        for piece in (region.plain, *region.pieces):
            inputs = piece.graph.find_nodes(op="placeholder")  # type: ignore[union-attr]
            names = dict(zip(inputs, given, strict=True))
            check_calls(piece.graph, shell, names.get)  # type: ignore[arg-type]


def _module(row: Mapping[str, Any], shell: nn.Module) -> GraphModule:
    graph = graph_json.from_json(row)
    held = {str(node.target): fetch(shell, str(node.target)) for node in graph.find_nodes(op="call_module")}
    graph.lint()
    return GraphModule(held, graph)


def _called(skeleton: nn.Module, graph: Graph) -> Iterator[str]:
    for node in graph.find_nodes(op="call_module"):
        module = fetch(skeleton, str(node.target))
        if isinstance(module, LaneRegion):
            for piece in (module.plain, *module.pieces):
                yield from (str(inner.target) for inner in piece.graph.find_nodes(op="call_module"))  # type: ignore[union-attr]
        else:
            yield str(node.target)


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are plain values."""
    return {
        name: graph_json.plain(value, name)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, _PLAIN)
