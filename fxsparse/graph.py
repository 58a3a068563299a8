"""What one may ask of an fx graph and do to it, without policy: names, call sites, safe edits."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

SITE_OPS: dict[Callable[..., Any], str] = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
}
"""Normal form of the ops that may become sparse: input, weight and bias are the first three arguments."""

ATEN_SITES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.linear.default: F.linear,
    torch.ops.aten.conv1d.default: F.conv1d,
    torch.ops.aten.conv1d.padding: F.conv1d,
    torch.ops.aten.conv2d.default: F.conv2d,
    torch.ops.aten.conv2d.padding: F.conv2d,
    torch.ops.aten.conv3d.default: F.conv3d,
    torch.ops.aten.conv3d.padding: F.conv3d,
    torch.ops.aten.conv_transpose1d.default: F.conv_transpose1d,
    torch.ops.aten.conv_transpose2d.input: F.conv_transpose2d,
    torch.ops.aten.conv_transpose3d.input: F.conv_transpose3d,
}
"""What exported graphs call, and what it is in normal form."""

CONVOLUTION = ("stride", "padding", "dilation", "groups")
"""What follows input, weight and bias in the arguments of a convolution, in order."""

PRODUCTS: dict[Callable[..., Any], int] = {
    **dict.fromkeys((torch.mm, torch.matmul, torch.linalg.matmul, operator.matmul), 0),
    **dict.fromkeys((torch.ops.aten.mm.default, torch.ops.aten.matmul.default), 0),
    torch.ops.aten.linalg_matmul.default: 0,
    **dict.fromkeys((torch.addmm, torch.ops.aten.addmm.default), 1),
}
"""Matrix products that can be ``F.linear``: position of the input; the weight follows it, a bias comes before."""

_FACTORS = {
    0: (("input", "self"), ("other", "mat2", "vec", "tensor")),
    1: (("mat1", "batch1", "mat"), ("mat2", "batch2", "vec")),
}
"""Names of what a matrix product multiplies, by the position of the first."""
_COMPRESSED = {
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), (Tensor.crow_indices, Tensor.col_indices)),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), (Tensor.ccol_indices, Tensor.row_indices)),
}
"""{sparse layout: what reads its two indices}"""
_TRANSPOSES = {
    torch.t, torch.transpose, torch.swapaxes, torch.swapdims, torch.permute,
    torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default,
    torch.ops.aten.numpy_T.default,
}  # fmt: skip
_TRANSPOSING = ("t", "transpose", "swapaxes", "swapdims", "permute")
_SLICES = {
    operator.getitem, torch.chunk, torch.split, torch.ops.aten.chunk.default, torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default, torch.ops.aten.slice.Tensor,
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One call of a site op on a parameter."""

    node: Node
    op: str
    weight: Node
    """The ``get_attr`` node of the parameter."""
    transposed: bool
    """The op reads the parameter transposed, as in GPT-2's Conv1D."""
    sliced: bool
    """The op reads a part of the parameter, as cross-attention does with its packed projections."""


def fetch(root: nn.Module, name: str) -> Any:
    """The attribute at a dotted name; AttributeError where the tree has none."""
    value: Any = root
    for part in name.split("."):
        value = getattr(value, part)
    return value


def owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the last part of a dotted name, and that part."""
    prefix, _, last = name.rpartition(".")
    return (fetch(root, prefix) if prefix else root), last


def set_parameter(root: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a new Parameter with this value in the place of the one at a dotted name; it needs a gradient as that did."""
    module, last = owner(root, name)
    module._parameters[last] = nn.Parameter(value, root.get_parameter(name).requires_grad)


def canonical_names(root: nn.Module) -> dict[str, str]:
    """{every name of every parameter: its first name}, so that tied parameters have one name."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in root.named_parameters(remove_duplicate=False)
    }


def attribute_nodes(graph: Graph, name: str) -> list[Node]:
    """The ``get_attr`` nodes of a dotted name, in graph order."""
    return list(graph.find_nodes(op="get_attr", target=name))


def readers(graph: Graph, name: str) -> int:
    """How many times nodes read the tensor at a dotted name."""
    return sum(len(node.users) for node in attribute_nodes(graph, name))


def is_parameter(gm: GraphModule, node: object) -> bool:
    """Whether a node's value is a parameter of the module."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return False
    return isinstance(fetch(gm, str(node.target)), nn.Parameter)


def argument(node: Node, position: int, name: str) -> Any:
    """An argument given by position or by name; None when it was left out."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def operand_of(node: Node) -> Any:
    """What a transpose, split or chunk reads, given by position or by name."""
    return node.args[0] if node.args else node.kwargs.get("tensor", node.kwargs.get("input"))


def factors(node: Node, first: int) -> list[Any]:
    """The two that a matrix product multiplies, given by position or by name; `first`: the first one's position."""
    named = [[node.kwargs[name] for name in names if name in node.kwargs] for names in _FACTORS[first]]
    return [node.args[at] if len(node.args) > at else named[at - first][0] for at in (first, first + 1)]


def given_arguments(node: Node, names: Sequence[str]) -> dict[str, Any] | None:
    """{name: value} of those arguments after the third that are given; None where the graph computes one of them."""
    found = {name: argument(node, 3 + place, name) for place, name in enumerate(names)}
    given = {name: value for name, value in found.items() if value is not None}
    return None if any(isinstance(value, Node) for value in given.values()) else given


def convolution_arguments(node: Node, shape: Sequence[int]) -> dict[str, Any]:
    """What a call of a convolution on a weight of `shape` is given, ``kernel_size`` and ``in_channels``, by name."""
    given = given_arguments(node, CONVOLUTION)
    assert given is not None, "storage is chosen where every argument is a number"
    plain = {
        name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in given.items()
    }
    channels = shape[1] * plain.get("groups", 1)
    return {"kernel_size": tuple(shape[2:]), "in_channels": channels, **plain}


def bias_of(gm: GraphModule, site: Site) -> Tensor | None:
    """The bias of a call site where the model holds it, detached; None where it has none or the graph computes it."""
    bias = argument(site.node, 2, "bias")
    return fetch(gm, str(bias.target)).detach() if isinstance(bias, Node) and bias.op == "get_attr" else None


def example_size(size: int | torch.SymInt, gm: GraphModule) -> int | None:
    """What a size in this graph is at the example inputs; None where it depends on values that no run has seen."""
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    environment: Any = size.node.shape_env
    found: Any = size.node.expr.xreplace(gm.meta.get("by_data", {}))
    found = found.xreplace(environment.backed_var_to_val)
    return int(found) if found.is_number else None


def sizes_by_data(value: Any) -> set[Any]:
    """Symbols in the sizes of tensors, and in sizes, which depend on the values of others: they have no example."""
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor | torch.SymInt)]
    return set[Any]().union(*map(free_unbacked_symbols, leaves))


def has_sparse_layout(value: Any) -> bool:
    """Whether a value is a tensor of one of PyTorch's sparse layouts."""
    return isinstance(value, Tensor) and (value.layout is torch.sparse_coo or value.layout in _COMPRESSED)


def strided_parts(tensor: Tensor) -> dict[str, Tensor]:
    """{suffix: strided tensor} that a tensor is made of: itself, or the indices and values of a sparse layout."""
    if tensor.layout is torch.sparse_coo:
        return {".indices": tensor._indices(), ".values": tensor._values()}
    if tensor.layout in _COMPRESSED:
        outer, inner = _COMPRESSED[tensor.layout]
        return {".outer": outer(tensor), ".inner": inner(tensor), ".values": tensor.values()}
    return {"": tensor}


def site_arguments(site: Site, shape: Sequence[int]) -> dict[str, Any]:
    """What a kernel's `run` takes besides tensors at a call site of a weight of `shape`."""
    if site.op == "linear":
        return {"in_features": shape[1]}
    return convolution_arguments(site.node, shape)


def sites(gm: GraphModule, name: str | None = None) -> list[Site]:
    """Call sites of every parameter, or of the parameter `name`, in graph order."""
    nodes = gm.graph.nodes if name is None else _above(gm.graph, name)
    found = [_site(gm, node) for node in nodes if node.op == "call_function" and node.target in SITE_OPS]
    return [site for site in found if site is not None and (name is None or site.weight.target == name)]


def _above(graph: Graph, name: str) -> list[Node]:
    """What reads a parameter, or a transpose or part of it, in graph order; a model may have thousands of weights."""
    found: set[Node] = set()
    left = attribute_nodes(graph, name)
    while left:
        users = left.pop().users.keys() - found
        found |= users
        left += [user for user in users if swaps_two_axes(user) or _takes_a_part(user)]
    return sorted(found)


def weight_source(gm: GraphModule, value: Any) -> tuple[Node, bool, bool] | None:
    """The parameter's ``get_attr`` node below transposes and slices, whether transposed, whether sliced;
    else None.
    """
    transposed = sliced = False
    while isinstance(value, Node) and value.op != "get_attr":
        if swaps_two_axes(value):
            transposed = not transposed
        elif _takes_a_part(value):
            sliced = True
        else:
            return None
        value = operand_of(value)
    return (value, transposed, sliced) if is_parameter(gm, value) else None


def swaps_two_axes(node: Node) -> bool:
    """Whether a node transposes."""
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    known = _TRANSPOSING if node.op == "call_method" else _TRANSPOSES
    if node.op not in ("call_method", "call_function") or node.target not in known:
        return False
    dims = [dim for dim in pytree.tree_leaves((node.args[1:], node.kwargs)) if isinstance(dim, int)]
    if node.target in ("permute", torch.permute, torch.ops.aten.permute.default):
        return [dim % len(dims) for dim in dims] != list(range(len(dims)))
    one, other = dims if len(dims) == 2 else (0, 1)
    mixed = min(one, other) < 0 <= max(one, other)  # of two dimensions 1 and -1 are the same
    return one != other and not (mixed and (one - other) % 2 == 0)


def is_product(node: Node) -> bool:
    """Whether a node is a matrix product that may be written as ``F.linear``."""
    return node.target in PRODUCTS or (node.op == "call_method" and node.target in ("matmul", "mm"))


def operation_name(node: Node) -> str:
    """The op of a node as a reader would write it: ``embedding``, ``aten.mul.Tensor``, ``module
    encoder.norm``.
    """
    if node.op == "call_module":
        return f"module {node.target}"
    return str(getattr(node.target, "__name__", node.target)) if callable(node.target) else str(node.target)


def insert_get_attr(graph: Graph, name: str, before: Node | None = None) -> Node:
    """A new ``get_attr`` node before a node, or at the top of the graph, below the placeholders."""
    if before is None:
        before = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(before):
        return graph.get_attr(name)


def replace(node: Node, target: Callable[..., Any], args: tuple[Any, ...], **kwargs: Any) -> Node:
    """Put a call of `target` in the place of a node, which is erased; its meta is carried over."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def comment(gm: GraphModule, texts: Mapping[str, str]) -> None:
    """Print a text above the call of each named node, wherever the graph's code is printed."""

    def commented(lines: list[str]) -> list[str]:
        return [f"# {texts[name]}\n{line}" if (name := _assigned(line)) in texts else line for line in lines]

    gm.graph.on_generate_code(lambda current: commented)
    gm.recompile()


def _assigned(line: str) -> str:
    """The name that a line of generated code gives a value to."""
    name, equals, _ = line.partition(" = ")
    return name.partition(" :")[0] if equals else ""


def is_pure(node: Node) -> bool:
    """Whether a node without users may be removed: no in-place op, no random op, nothing unknown.

    ``Graph.eliminate_dead_code`` removes in-place ``call_method`` nodes, so it is not used anywhere here.
    """
    if node.op == "get_attr":
        return True
    if node.op == "call_method":
        return str(node.target) in _PURE_METHODS
    if node.op != "call_function" or "out" in node.kwargs or node.kwargs.get("inplace"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        return node.target.namespace == "aten" and not node.target._schema.is_mutable and not random
    return node.target in _PURE_FUNCTIONS


def eliminate_dead_code(graph: Graph) -> int:
    """Erase pure nodes that nobody reads, and return how many."""
    erased = 0
    for node in reversed(graph.nodes):
        if not node.users and is_pure(node):
            graph.erase_node(node)
            erased += 1
    return erased


def _site(gm: GraphModule, node: Node) -> Site | None:
    source, op = weight_source(gm, argument(node, 1, "weight")), SITE_OPS[node.target]  # type: ignore[index]
    return None if source is None or (source[1] and op != "linear") else Site(node, op, *source)


def _takes_a_part(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in ("chunk", "split")
    return node.op == "call_function" and node.target in _SLICES


_PURE_METHODS = frozenset({
    "size", "dim", "view", "reshape", "permute", "transpose", "swapaxes", "swapdims", "t", "flatten",
    "unflatten", "chunk", "split", "unbind", "squeeze", "unsqueeze", "expand", "contiguous", "to", "float",
    "detach", "add", "sub", "mul", "div", "matmul", "mean", "sum", "softmax", "movedim", "type_as", "new_zeros",
    "new_ones",
})  # fmt: skip
_PURE_FUNCTIONS = frozenset(
    {
        *(getattr, *_TRANSPOSES, *_SLICES, *SITE_OPS, *PRODUCTS),
        *(torch.add, torch.sub, torch.mul, torch.cat, torch.flatten, torch.reshape),
        *(torch.zeros, torch.ones, torch.arange, torch.full),
        *(
            operator.add,
            operator.sub,
            operator.mul,
            operator.truediv,
            operator.floordiv,
            operator.eq,
            operator.ne,
        ),
    }
)
