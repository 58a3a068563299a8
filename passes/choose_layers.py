"""Choose the layers that a transformation replaces or makes sparse, and say why the others stay dense."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fxsparse.graph import (
    CONVOLUTION,
    Site,
    argument,
    attribute_nodes,
    canonical_names,
    given_arguments,
    operation_name,
    sites,
)
from fxsparse.pipeline import PassContext, Transformed, WeightSpec
from fxsparse.transforms import SparseWide

_WHERE = "Sparse-IFT leaves it dense"


@dataclass(frozen=True)
class ChooseLayers:
    """Fill ``ctx.transformed.layers`` and ``.dense``; rewrites nothing.

    As in arXiv:2303.11525 the layers that read the model's input and those that make its output stay dense, and so do
    grouped and depthwise convolutions; shortcuts are transformed.  A layer after an embedding reads no input.
    """

    name: ClassVar[str] = "choose-layers"
    after: ClassVar[tuple[str, ...]] = ("collect-weights", "infer-shapes")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if ctx.transformed is not None:
            return 0  # the graphs of both modes were looked at together
        ctx.transformed = found = Transformed()
        graphs = [graph for _, graph in ctx.program.distinct_graphs()]
        ends: dict[str, str] = {}
        for graph in graphs:
            ends |= _ends(graph)
        wide = ctx.plan is not None and isinstance(ctx.plan.transform, SparseWide)
        for name, spec in ctx.weights.items():
            calls = [site for graph in graphs for site in sites(graph, name)]
            reason = ends.get(name) or _refusal(spec, calls, wide)
            if reason is None and not wide:
                reason = _why_kept(ctx.program.skeleton, graphs, name)
            if reason is None:
                found.layers.append(name)
            else:
                found.dense[name] = f"{_WHERE}: {reason}"
        return 0


def _refusal(spec: WeightSpec, calls: list[Site], wide: bool) -> str | None:
    if spec.groups != 1:
        return "depthwise convolution" if spec.shape[1] == 1 else "grouped convolution"
    if "transpose" in spec.op:
        return "transposed convolution"
    if not wide and spec.aliases:
        return f"tied to {spec.aliases[0]!r}"
    if not wide and any(call.sliced for call in calls):
        return "its calls read parts of it"
    return None


def _why_kept(gm: GraphModule, graphs: Sequence[GraphModule], name: str) -> str | None:
    """Why the module of a layer cannot be replaced: its calls differ, or more than they read its parts."""
    found = [site for graph in graphs for site in sites(graph, name)]
    biases = [argument(site.node, 2, "bias") for site in found]
    if any(isinstance(bias, Node) and bias.op != "get_attr" for bias in biases):
        return "the graph computes its bias"
    names = {str(bias.target) for bias in biases if isinstance(bias, Node)}
    if len(names) > 1 or (names and None in biases):
        return "its calls add different biases"
    options = {repr(given_arguments(site.node, CONVOLUTION)) for site in found if site.op != "linear"}
    if len(options) > 1 or len({site.transposed for site in found}) > 1:
        return "its calls read it in different ways"
    tied = canonical_names(gm)
    for bias in names:
        others = [other for other, first in tied.items() if first == tied.get(bias) and other != bias]
        if others:
            return f"its bias is tied to {others[0]!r}"
    calls = {site.node for site in found}
    for part, what in ((name, "it"), *((bias, "its bias") for bias in names)):
        direct = [
            user for graph in graphs for node in attribute_nodes(graph.graph, part) for user in node.users
        ]
        if any(user not in calls and calls.isdisjoint(user.users) for user in direct):
            return f"something other than its calls reads {what}"
    return None


def _ends(gm: GraphModule) -> dict[str, str]:
    """{weight: reason} of the layers with no other layer or embedding before them, or none after them."""
    calls = {site.node: str(site.weight.target) for site in sites(gm)}
    makers = {node for node in gm.graph.nodes if node in calls or "embedding" in _words(gm, node)}
    before = _reached(list(gm.graph.nodes), makers, lambda node: node.all_input_nodes)
    after = _reached(list(gm.graph.nodes)[::-1], set(calls), lambda node: list(node.users))
    found = {name: "it reads the model's input" for node, name in calls.items() if node not in before}
    return found | {name: "it makes the model's output" for node, name in calls.items() if node not in after}


def _reached(
    order: Sequence[Node], makers: set[Node], neighbours: Callable[[Node], Iterable[Node]]
) -> set[Node]:
    """Nodes of which a neighbour, or one further on, is among the makers."""
    found: set[Node] = set()
    for node in order:
        if any(other in makers or other in found for other in neighbours(node)):
            found.add(node)
    return found


def _words(gm: GraphModule, node: Node) -> str:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__.lower()
    return operation_name(node).lower() if node.op == "call_function" else ""
