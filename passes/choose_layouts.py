"""Let dense convolutions that are neighbours hold channels last, where that is worth its copies at the border."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import choosing, kernel, machine
from fxsparse.graph import Site, bias_of, example_size, fetch, site_arguments, sites
from fxsparse.image_ops import ADDS, MODULES, POINTWISE, POOLINGS, channels_first, channels_last
from fxsparse.passes.fuse_epilogue import fused_activation
from fxsparse.passes.select_kernels import call_inputs, site_problem
from fxsparse.pipeline import Decision, PassContext
from fxsparse.timing import interleaved_quartiles

DENSE_LAST = "onednn-conv"
"""The kernel whose result is in the memory format of its input, and which is fastest with channels last."""
FIRST, LAST = "channels first", "channels last"
_ATEN = torch.ops.aten
_EITHER = POINTWISE | POOLINGS | ADDS | {
    "relu", "sigmoid", "tanh", operator.mul, torch.mul, torch.cat,
    _ATEN.relu.default, _ATEN.silu.default, _ATEN.gelu.default, _ATEN.hardswish.default, _ATEN.hardtanh.default,
    _ATEN.sigmoid.default, _ATEN.hardsigmoid.default, _ATEN.add.Tensor, _ATEN.mul.Tensor, _ATEN.cat.default,
    _ATEN.max_pool2d.default, _ATEN.avg_pool2d.default, _ATEN.adaptive_avg_pool2d.default,
}  # fmt: skip
"""What computes the same from images in either format, and gives its result in that of its inputs."""


@dataclass(frozen=True)
class ChooseLayouts:
    """The cheapest memory format of every image in the graph: a minimum cut between channels first and channels last.

    A convolution costs what its kernel was measured to take in either, an edge between the two a copy; ops that do not
    care cost nothing, all others take channels first.  Where convolutions hold channels last, oneDNN computes them,
    whatever was chosen before.
    """

    name: ClassVar[str] = "choose-layouts"
    after: ClassVar[tuple[str, ...]] = ("select-kernels", "select-entry-kernels")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of convolutions that hold channels last."""
        found = _convolutions(gm, ctx)
        if not found:
            return 0
        inputs = call_inputs(gm, ctx, {site.node: site.node.args[:1] for site in found.values()})
        costs = {
            site.node: _costs(gm, site, inputs[site.node][0], ctx.decisions[name])
            for name, site in found.items()
        }
        last = _cut(gm, costs)
        for name, site in found.items():
            if site.node in last:
                _hold_last(ctx.decisions[name], costs[site.node])
        _convert(gm, last)
        return sum(site.node in last for site in found.values())


def _convolutions(gm: GraphModule, ctx: PassContext) -> dict[str, Site]:
    """{weight: its only call site} of the convolutions of images that were measured, and whose shapes are known."""
    if ctx.program.tier == "walk" or DENSE_LAST not in kernel.registered():
        return {}
    measured = {name: sites(gm, name) for name, d in ctx.decisions.items() if d.dense_us is not None}
    alone = {name: found[0] for name, found in measured.items() if len(found) == 1}
    images = {name: (site.node, site.node.args[0]) for name, site in alone.items() if site.op == "conv2d"}
    return {name: alone[name] for name, values in images.items() if all(map(_is_images, values))}


@dataclass(frozen=True)
class _Costs:
    """Microseconds of a convolution with its inputs and results in either format, and of a copy of its input."""

    first: float
    last: float
    copy: float
    limit: float = 0.0
    """Of oneDNN's kernel, by its FLOPs and bytes."""


def _costs(gm: GraphModule, site: Site, x: Tensor, decision: Decision) -> _Costs:
    first = decision.dense_us if decision.format == "dense" else decision.sparse_us
    assert first is not None
    entry, weight = kernel.registered()[DENSE_LAST], fetch(gm, str(site.weight.target)).detach()
    problem = site_problem(site, weight, x, decision.nnz)
    if x.dim() != 4 or entry.refuses(problem):
        return _Costs(first, math.inf, 0.0)
    bias, activation = bias_of(gm, site), fused_activation(gm, site.node)
    part, x, scale = choosing.some_samples(problem, x)
    key = (LAST, part, tuple(x.shape), bias is None, activation, torch.get_num_threads())
    times = machine.recall(key)
    if times is None:
        given, held = site_arguments(site, weight.shape), x.contiguous(memory_format=torch.channels_last)
        calls = {
            "last": lambda: entry.run(held, bias, weight, activation=activation, **given),
            "copy": lambda: held.contiguous(),
        }
        with torch.no_grad():
            times = interleaved_quartiles(calls, rounds=15, seconds=0.3)
        machine.remember(key, times)
    return _Costs(first, scale * times["last"], scale * times["copy"], choosing.limit_us(entry, problem))


def _cut(gm: GraphModule, costs: Mapping[Node, _Costs]) -> set[Node]:
    """The nodes whose images hold channels last."""
    per_number = sum(c.copy for c in costs.values()) / max(1, sum(_size(gm, n.args[0]) for n in costs))
    images = {node.name: node for node in gm.graph.nodes if _is_images(node)}
    flow = nx.DiGraph()
    flow.add_nodes_from((FIRST, LAST))
    for name, node in images.items():
        if node in costs:
            flow.add_edge(FIRST, name, capacity=costs[node].last)
            flow.add_edge(name, LAST, capacity=costs[node].first)
        elif not _takes_either(gm, node):
            flow.add_edge(FIRST, name)  # an edge without a capacity can't be cut
        # One copy serves all readers that hold the other format.
        flow.add_edge(name, f"{name} {LAST}", capacity=per_number * _size(gm, node))
        flow.add_edge(f"{name} {FIRST}", name, capacity=per_number * _size(gm, node))
        for reader in filter(_reads_memory, node.users):
            there = reader.name if reader.name in images else FIRST
            flow.add_edge(f"{name} {LAST}", there)
            flow.add_edge(there, f"{name} {FIRST}")
    _, (_, last) = nx.minimum_cut(flow, FIRST, LAST)
    return {images[name] for name in last & images.keys()}


def _is_images(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return (
        isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point() and node.op != "get_attr"
    )  # type: ignore[union-attr]


def _reads_memory(node: Node) -> bool:
    """Not so where a node asks for the shape."""
    return node.op == "output" or not isinstance(
        node.meta.get("val"), int | float | torch.SymInt | torch.Size
    )


def _takes_either(gm: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return type(fetch(gm, str(node.target))) in MODULES
    return node.op in ("call_function", "call_method") and node.target in _EITHER


def _size(gm: GraphModule, node: object) -> int:
    """Numbers of an image at the example inputs."""
    assert isinstance(node, Node)
    return example_size(node.meta["val"].numel(), gm) or 0


def _hold_last(decision: Decision, costs: _Costs) -> None:
    decision.storage, decision.format, decision.kernel, decision.values_dtype = (
        "dense",
        "dense",
        DENSE_LAST,
        None,
    )
    decision.reason = f"{LAST}, as its neighbours: {costs.last:.1f} us, {costs.first:.1f} us with {FIRST}"
    decision.dense_us, decision.limit_us = costs.last, costs.limit


def _convert(gm: GraphModule, last: set[Node]) -> None:
    """Copy images where one format meets the other."""
    for node in filter(_is_images, list(gm.graph.nodes)):
        others = [user for user in node.users if _reads_memory(user) and (user in last) != (node in last)]
        if not others:
            continue
        with gm.graph.inserting_after(node):
            copied = gm.graph.call_function(channels_first if node in last else channels_last, (node,))
        copied.meta["val"] = node.meta["val"]
        for user in others:
            user.replace_input_with(node, copied)
