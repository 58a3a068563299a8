"""Bring every call of a Linear, a convolution or a matrix product with a parameter into one normal form."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxsparse.graph import (
    ATEN_SITES,
    PRODUCTS,
    SITE_OPS,
    argument,
    attribute_nodes,
    canonical_names,
    factors,
    fetch,
    insert_get_attr,
    is_parameter,
    is_product,
    operand_of,
    replace,
    swaps_two_axes,
    weight_source,
)
from fxsparse.pipeline import PassContext
from fxsparse.trace.modules import FUNCTIONAL, functional_arguments, refuses_functional, site_type

_CONVOLUTIONS = {
    False: {3: F.conv1d, 4: F.conv2d, 5: F.conv3d},
    True: {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d},
}


@dataclass(frozen=True)
class Functionalize:
    """Afterwards each such call is ``F.linear`` or ``F.conv*`` on ``get_attr`` nodes.

    A matrix product ``x @ W`` becomes ``F.linear(x, W.t())``.  Norms and dropouts stay modules.  A module that its
    functional cannot say (hooks, parametrized weight, padding_mode) stays a call, with a note.
    """

    name: ClassVar[str] = "functionalize"
    after: ClassVar[tuple[str, ...]] = ()
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Rewrite every call that can be; returns how many."""
        names = canonical_names(gm)
        rewritten = sum(_rewrite(gm, node, names, ctx.notes) for node in list(gm.graph.nodes))
        for node in reversed(gm.graph.nodes):
            if not node.users and swaps_two_axes(node):
                gm.graph.erase_node(node)  # it would count as a reader of the weight
        return rewritten


def _rewrite(gm: GraphModule, node: Node, names: dict[str, str], notes: list[str]) -> bool:
    if node.op == "call_module":
        return _rewrite_module(gm, node, names, notes)
    if node.target in ATEN_SITES:
        replace(node, ATEN_SITES[node.target], node.args, **node.kwargs)
        return True
    if node.target in SITE_OPS and node.kwargs.keys() & {"input", "weight"}:
        named = {"input": 0, "weight": 1, "bias": 2}
        node.args = (*(argument(node, at, name) for name, at in named.items()), *node.args[3:])
        node.kwargs = {name: value for name, value in node.kwargs.items() if name not in named}
        return True
    if node.target is torch.ops.aten.convolution.default:
        return _rewrite_convolution(gm, node)
    return is_product(node) and _rewrite_product(gm, node)


def _rewrite_module(gm: GraphModule, node: Node, names: dict[str, str], notes: list[str]) -> bool:
    path = str(node.target)
    module = gm.get_submodule(path)
    kind = site_type(module)
    if not isinstance(module, tuple(FUNCTIONAL)):
        return False
    reason = refuses_functional(module)
    if len(node.args) + len(node.kwargs) > 1:
        reason = "the call passes more than an input (output_size)"
    if reason is not None or kind is None:
        notes.append(f"{path} stays a module: {reason}")
        return False
    weight = _attribute(gm, names[f"{path}.weight"], node)
    bias = None if module.bias is None else _attribute(gm, names[f"{path}.bias"], node)
    replace(
        node, FUNCTIONAL[kind], (argument(node, 0, "input"), weight, bias), **functional_arguments(module)
    )
    return True


def _rewrite_convolution(gm: GraphModule, node: Node) -> bool:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    source = weight_source(gm, weight)
    if source is None:
        return False
    call = _CONVOLUTIONS[bool(transposed)].get(fetch(gm, str(source[0].target)).dim())
    if call is None:
        return False
    extra = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transposed:
        extra["output_padding"] = output_padding
    replace(node, call, (x, weight, bias), **extra)
    return True


def _rewrite_product(gm: GraphModule, node: Node) -> bool:
    if node.kwargs.keys() - {"input", "other", "mat1", "mat2"}:
        return False
    first = PRODUCTS.get(node.target, 0)  # type: ignore[arg-type]
    x, weight = factors(node, first)
    bias = argument(node, 0, "input") if first else None
    source = weight_source(gm, weight)
    if source is None or fetch(gm, str(source[0].target)).dim() != 2:
        return False
    if bias is not None and not (is_parameter(gm, bias) and fetch(gm, str(bias.target)).dim() == 1):  # type: ignore[union-attr]
        return False
    replace(node, F.linear, (x, _transposed(weight), bias))
    return True


def _transposed(weight: Any) -> Any:
    """The transpose of a 2-D weight expression; of a transpose, what it transposes."""
    if swaps_two_axes(weight):
        return _without_pairs(operand_of(weight))
    with weight.graph.inserting_after(weight):
        return weight.graph.call_function(torch.t, (weight,))


def _without_pairs(weight: Any) -> Any:
    """What a transpose of a transpose of it reads, and so on."""
    while swaps_two_axes(weight) and swaps_two_axes(operand_of(weight)):
        weight = operand_of(operand_of(weight))
    return weight


def _attribute(gm: GraphModule, name: str, before: Node) -> Node:
    """The graph's only ``get_attr`` of a parameter, moved or created so that it comes before a node."""
    known = attribute_nodes(gm.graph, name)
    if not known:
        return insert_get_attr(gm.graph, name, before)
    if before < known[0]:
        before.prepend(known[0])
    return known[0]
