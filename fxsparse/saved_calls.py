"""What a graph from a file gives to kernels: the buffers of one packed weight, at its own sizes, and nothing else."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from fxsparse import kernel
from fxsparse.graph import fetch
from fxsparse.packed import PackedWeight

_IN_LANES = ("csr_conv_lanes",)


def check_calls(graph: Graph, root: nn.Module, name_of: Callable[[Node], str | None]) -> None:
    """ValueError unless every call of a kernel reads a PackedWeight of `root` as it was packed.

    Kernels trust their indices, so a graph may not mix them.  `name_of`: what an argument holds, by its name in `root`.
    """
    entries = {entry.run for entry in kernel.registered().values() if entry.format != "dense"}
    lanes = {kernel.glue(name) for name in _IN_LANES}
    for node in graph.nodes:
        if node.op == "call_function" and (node.target in entries or node.target in lanes):
            packed = _weight(node, root, name_of)
            is_its_own = node.target in lanes or kernel.registered()[packed.kernel].run is node.target
            if not is_its_own or (node.target in lanes) != (
                node.target in lanes and packed.lanes is not None
            ):
                raise ValueError(f"{node.name} runs another kernel than its weight was packed for")
            _check_sizes(node, packed.shape, dict(node.kwargs))


def _weight(node: Node, root: nn.Module, name_of: Callable[[Node], str | None]) -> PackedWeight:
    names = [name_of(arg) if isinstance(arg, Node) else None for arg in node.args[2:]]
    path = (names[0] or "").rpartition(".")[0] if names else ""
    packed = fetch(root, path) if path else None
    if not isinstance(packed, PackedWeight):
        raise ValueError(f"{node.name} reads no packed weight")
    if names != [f"{path}.{name}" for name, _ in packed.named_buffers()]:
        raise ValueError(f"{node.name} reads {names} in the place of the buffers of {path}")
    return packed


def _check_sizes(node: Node, shape: tuple[int, ...], given: Mapping[str, Any]) -> None:
    groups = given.get("groups", 1)
    wanted: dict[str, Any] = {"in_features": shape[1]}
    if len(shape) > 2:
        sizes = shape[2:]
        wanted = {"kernel_size": sizes, "in_channels": shape[1] * groups}
    for name, size in wanted.items():
        got = given.get(name)
        if (tuple(got) if isinstance(got, list | tuple) else got) != size:
            raise ValueError(f"{node.name} has {name}={got!r}, and its weight {size}")
