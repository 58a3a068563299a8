"""Dynamo's graph as a model that holds its parameters and buffers, which Dynamo hands over as inputs."""

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxsparse.graph import SITE_OPS, argument, fetch, weight_source
from fxsparse.skeleton import bind, copy_structure

_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")


@dataclass(frozen=True)
class HeldGraph:
    """A graph of Dynamo's as a model."""

    root: GraphModule
    """Takes the inputs that are left and reads the others from its tree, where they have the model's own names."""
    names: Mapping[int, str]
    """{position among Dynamo's inputs: name of the Parameter or buffer}."""
    inputs: tuple[int, ...]
    """Positions of the inputs that are left."""
    examples: tuple[Any, ...]
    """What those are in this call: tensors and numbers."""

    def tensors(self) -> dict[str, Tensor]:
        """{name: Parameter or buffer}."""
        return {name: fetch(self.root, name) for name in self.names.values()}

    def arguments(self) -> list[Any]:
        """What Dynamo's graph was given."""
        tensors = self.tensors()
        given = dict(zip(self.inputs, self.examples, strict=True))
        given |= {position: tensors[name] for position, name in self.names.items()}
        return [given[position] for position in range(len(given))]

    def parameters(self) -> tuple[int, ...]:
        """Positions of the Parameters, which tell one model from another; of all tensors where there are none."""
        tensors = self.tensors()
        found = [position for position, name in self.names.items() if isinstance(tensors[name], nn.Parameter)]
        return tuple(found or self.names)

    def emptied(self) -> "HeldGraph":
        """The same graph without any tensor of the model or input, which then may be freed."""
        return self.refreshed([None] * (len(self.names) + len(self.inputs)))

    def refreshed(self, args: Sequence[Any]) -> "HeldGraph":
        """The same graph with what Dynamo's graph was given in another call."""
        skeleton = copy_structure(self.root)
        for position, name in self.names.items():
            path, _, leaf = name.rpartition(".")
            module = skeleton.get_submodule(path)
            kept: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            kept[leaf] = args[position]
        graph, examples = copy.deepcopy(self.root.graph), tuple(args[k] for k in self.inputs)
        return replace(self, root=bind(graph, skeleton), examples=examples)


def hold(gm: GraphModule, example_inputs: Sequence[Any], also: Collection[int] = ()) -> HeldGraph:
    """Move what ``gm`` is given of a model's tensors into a tree of modules; `gm` is left as it is.

    Inputs at the positions `also` count as the model's.
    """
    skeleton = _with_attributes_of(gm)
    graph, names, inputs = copy.deepcopy(gm.graph), {}, []
    first = next(node for node in graph.nodes if node.op != "placeholder")
    given = zip(
        graph.find_nodes(op="placeholder"), map(_source, gm.graph.find_nodes(op="placeholder")), strict=True
    )
    for position, (node, source) in enumerate(given):
        value = example_inputs[position]
        if not (position in also or _is_held(source, value)):
            inputs.append(position)
            continue
        own_name = ".".join(_PART.findall(source)) or node.name
        names[position] = name = _put(skeleton, own_name, node.name, value)
        with graph.inserting_before(first):
            read = graph.get_attr(name)
        node.replace_all_uses_with(read)
        graph.erase_node(node)
    for node in graph.nodes:
        node.meta = {}  # its fake tensors belong to Dynamo
    examples = tuple(_plain(example_inputs[k]) for k in inputs)
    return HeldGraph(bind(graph, skeleton), names, tuple(inputs), examples)


def _is_held(source: str, value: Any) -> bool:
    return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and "._buffers[" in source)


def _source(node: Node) -> str:
    """Where Dynamo has an input from, such as ``L['self']._modules['fc']._parameters['weight']``."""
    source = getattr(node, "_dynamo_source", None)  # an attribute of the node alone, which no copy has
    return "" if source is None else str(source.name)


def copied_with_sources(graph: Graph) -> Graph:
    """A copy of a graph of Dynamo's whose inputs still say where they are from."""
    copied = copy.deepcopy(graph)
    pairs = zip(graph.find_nodes(op="placeholder"), copied.find_nodes(op="placeholder"), strict=True)
    for node, other in pairs:
        if (source := getattr(node, "_dynamo_source", None)) is not None:
            other._dynamo_source = source
    return copied


def _plain(value: Any) -> Any:
    return int(value.node.hint) if isinstance(value, SymInt) else value  # type: ignore[arg-type]


def _with_attributes_of(gm: GraphModule) -> nn.Module:
    """A tree that holds the constants and regions (of checkpoints, say) that the graph reads."""
    skeleton = nn.Module()
    for node in gm.graph.find_nodes(op="get_attr"):
        value, name = fetch(gm, str(node.target)), str(node.target)
        kept: dict[str, Any] = skeleton._modules if isinstance(value, nn.Module) else skeleton._buffers
        kept[name] = value
    for node in gm.graph.find_nodes(op="call_module"):
        skeleton._modules[str(node.target)] = gm.get_submodule(str(node.target))
    return skeleton


def _put(skeleton: nn.Module, name: str, other: str, value: Tensor) -> str:
    """Put a tensor under a name that is free: `name`, else `other`; returns that."""
    parts = name.split(".")
    if hasattr(GraphModule, parts[0]) or not _is_free(skeleton, parts):
        parts = [other]
    holder = skeleton
    for part in parts[:-1]:
        if part not in holder._modules:
            holder._modules[part] = nn.Module()
        child = holder._modules[part]
        assert child is not None
        holder = child
    kept: dict[str, Any] = holder._parameters if isinstance(value, nn.Parameter) else holder._buffers
    kept[parts[-1]] = value
    return ".".join(parts)


def _is_free(skeleton: nn.Module, parts: Sequence[str]) -> bool:
    holder: Any = skeleton
    for part in parts[:-1]:
        if part not in holder._modules:
            return not hasattr(holder, part)
        holder = holder._modules[part]
    return not hasattr(holder, parts[-1])


# -- weights that are computed from weights ----------------------------------------------------------------


def with_weights_folded(held: HeldGraph) -> GraphModule:
    """The graph, on a tree of its own, with every weight that it computes from the model's tensors as a Parameter.

    Parametrizations and masks of pruning compute such weights.
    """
    root = bind(copy.deepcopy(held.root.graph), copy_structure(held.root))
    known: dict[Node, Any] = {}
    made: dict[Node, Node] = {}
    for node in list(root.graph.nodes):
        weight = argument(node, 1, "weight") if node.target in SITE_OPS else None
        if not isinstance(weight, Node) or weight.op == "get_attr" or weight_source(root, weight):
            continue
        value = _constant(root, weight, known)
        if not isinstance(value, Tensor):
            continue
        if weight not in made:
            parameter = nn.Parameter(value, requires_grad=False)
            name = _put(root, f"{_first_tensor(weight)}_folded", f"_folded_{len(made)}", parameter)
            with root.graph.inserting_before(node):
                made[weight] = root.graph.get_attr(name)
        node.replace_input_with(weight, made[weight])  # what else reads it goes on computing it
    for node in reversed(root.graph.nodes):
        if node in known and not node.users:
            root.graph.erase_node(node)
    root.recompile()
    return root


@torch.no_grad()
def _constant(root: GraphModule, node: Node, known: dict[Node, Any]) -> Any:
    """What a node computes from tensors of the tree alone; None where inputs, chance or writing have a part in it."""
    if node not in known:
        known[node] = None
        if node.op == "get_attr":
            known[node] = fetch(root, str(node.target)).detach()
        elif node.op in ("call_function", "call_method") and _is_function(node):
            sources = {source: _constant(root, source, known) for source in node.all_input_nodes}
            if sources and all(value is not None for value in sources.values()):
                args, kwargs = map_arg((node.args, node.kwargs), sources.__getitem__)
                target: Any = node.target
                call = getattr(args[0], target) if node.op == "call_method" else target
                known[node] = call(*(args[1:] if node.op == "call_method" else args), **kwargs)
    return known[node]


def _is_function(node: Node) -> bool:
    """Whether the op is one of those that parametrizations and masks are made of."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _FUNCTIONS


_FUNCTIONS = frozenset(
    [
        *(
            "add",
            "sub",
            "mul",
            "div",
            "truediv",
            "neg",
            "abs",
            "square",
            "sqrt",
            "rsqrt",
            "pow",
            "exp",
            "tanh",
        ),
        *("sum", "norm", "linalg_vector_norm", "mean", "to", "float", "type_as", "where", "t", "transpose"),
        *(
            "permute",
            "view",
            "reshape",
            "flatten",
            "unsqueeze",
            "expand",
            "expand_as",
            "view_as",
            "contiguous",
        ),
        *("_weight_norm", "triu", "tril", "mm", "matmul", "masked_fill", "detach", "clone", "getitem"),
    ]
)


def _first_tensor(node: Node) -> str:
    """The name of the first tensor of the tree that goes into a node."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)
