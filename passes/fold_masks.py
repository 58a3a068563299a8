"""Bring the evaluation graph of a training module back to ops on plain dense weights."""

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import module
from fxsparse.graph import (
    CONVOLUTION,
    attribute_nodes,
    eliminate_dead_code,
    fetch,
    insert_get_attr,
    is_parameter,
    owner,
    readers,
    replace,
)
from fxsparse.packed import drop_tensor, replace_parameter
from fxsparse.passes.insert_soft_masks import NUMBERS
from fxsparse.pipeline import PassContext
from fxsparse.soft_masks import shared_shift
from fxsparse.storage import CompactWeight, MaskedWeight, read_weights

_VALUES = ".values"
_OPS = {2: F.linear, 3: F.conv1d, 4: F.conv2d}
"""By the dimensions of the weight."""
_MULTIPLICATIONS = (operator.mul, torch.mul, torch.ops.aten.mul.Tensor, "mul")


@dataclass(frozen=True)
class FoldMasks:
    """reparam(w, mask) becomes the effective weight, and the product of a compact weight the dense op that it was.

    The skeleton gets new Parameters; those of the training module are left as they are.  So selection starts from
    one normal form whatever training held.  Where the compact weights together would take more than
    ``module.MAX_DENSE_BYTES`` as dense ones, none is made: their Parameters are on meta, and ``ctx.entries`` has
    the nonzeros.  A product of a Parameter that nothing else reads and a buffer that the graph only multiplies, as in
    a mask written by hand, becomes that Parameter too; the buffer goes.
    """

    name: ClassVar[str] = "fold-masks"
    after: ClassVar[tuple[str, ...]] = ()
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of rewritten nodes; 0 on a model that has no masks."""
        rewrites = _fold_masked(gm, ctx) + _fold_compact(gm, ctx) + _fold_products(gm)
        if rewrites:
            eliminate_dead_code(gm.graph)
        return rewrites


def _fold_masked(gm: GraphModule, ctx: PassContext) -> int:
    if ctx.plan is None:
        return 0
    method = ctx.plan.method
    function, _ = method.reparam.function(dense_grad=False)
    found = gm.graph.find_nodes(op="call_function", target=function)
    names = [str(node.args[0].target) for node in found]
    for name, weight in read_weights(gm, dict.fromkeys(names, False), method.extras):
        assert isinstance(weight, MaskedWeight), "the graph reads its mask"
        replace_parameter(gm, name, weight.folded(method.reparam))
        holder, leaf = owner(gm, name)
        for beside in ("mask", "soft", *(extra.name for extra in method.extras)):
            holder._buffers.pop(f"{leaf}_{beside}", None)
            holder._parameters.pop(f"{leaf}_{beside}", None)
    linear = getattr(method.reparam, "linear", None)
    for node in gm.graph.find_nodes(op="call_function", target=linear) if linear is not None else ():
        replace(node, F.linear, node.args[:3])
        gm._buffers.pop("fxsparse_step", None)
    for node in found:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    if NUMBERS in gm._buffers:
        for node in gm.graph.find_nodes(op="call_function", target=shared_shift):
            gm.graph.erase_node(node)
        del gm._buffers[NUMBERS]
    return len(found)


def _fold_compact(gm: GraphModule, ctx: PassContext) -> int:
    found = [(node, name) for node in gm.graph.nodes if (name := _compact_name(gm, node)) is not None]
    stored = {name: fetch(gm, name) for _, name in found}
    too_large = sum(weight.dense_bytes for weight in stored.values()) > module.MAX_DENSE_BYTES
    if too_large:
        ctx.entries |= {name: weight.entries() for name, weight in stored.items()}
    for node, name in found:
        compact = fetch(gm, name)
        if isinstance(compact, CompactWeight):
            holder, leaf = owner(gm, name)
            del holder._modules[leaf]
            replace_parameter(gm, name, _on_meta(compact) if too_large else compact.dense())
        known = attribute_nodes(gm.graph, name)
        weight = known[0] if known else insert_get_attr(gm.graph, name, node)
        op = _OPS[fetch(gm, name).dim()]
        given = {key: value for key, value in node.kwargs.items() if key in CONVOLUTION}
        replace(node, op, (node.args[0], weight, node.args[1]), **given)
    return len(found)


def _fold_products(gm: GraphModule) -> int:
    rewrites = 0
    for node in list(gm.graph.nodes):
        pair = _parameter_and_mask(gm, node)
        if pair is None or not _is_constant(gm, *pair):
            continue
        rewrites, (weight, mask) = rewrites + 1, pair
        effective = fetch(gm, str(weight.target)).detach() * fetch(gm, str(mask.target))
        replace_parameter(gm, str(weight.target), effective)
        node.replace_all_uses_with(weight)
        gm.graph.erase_node(node)
        if not readers(gm.graph, str(mask.target)):
            drop_tensor(gm, str(mask.target))
    return rewrites


def _parameter_and_mask(gm: GraphModule, node: Node) -> tuple[Node, Node] | None:
    """The two factors where a node multiplies a Parameter by a buffer."""
    factors = [arg for arg in node.args if isinstance(arg, Node) and arg.op == "get_attr"]
    if node.target not in _MULTIPLICATIONS or len(factors) != 2 or len(node.args) != 2 or node.kwargs:
        return None
    weight, mask = sorted(factors, key=lambda factor: not is_parameter(gm, factor))
    return (weight, mask) if is_parameter(gm, weight) and not is_parameter(gm, mask) else None


def _is_constant(gm: GraphModule, weight: Node, mask: Node) -> bool:
    """Whether nothing else reads the Parameter, nothing writes the mask, and the product has the Parameter's form."""
    values, factor = fetch(gm, str(weight.target)), fetch(gm, str(mask.target))
    users = [user for read in attribute_nodes(gm.graph, str(mask.target)) for user in read.users]
    if values.is_meta or readers(gm.graph, str(weight.target)) != 1:
        return False
    if any(_parameter_and_mask(gm, user) is None for user in users):
        return False
    called = [gm.get_submodule(str(call.target)) for call in gm.graph.find_nodes(op="call_module")]
    if any(held is values or held is factor for m in called for held in (*m.parameters(), *m.buffers())):
        return False
    kept = torch.broadcast_shapes(values.shape, factor.shape) == values.shape
    return kept and torch.result_type(values, factor) == values.dtype


def _on_meta(weight: CompactWeight) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.values.dtype, device="meta")


def _compact_name(gm: GraphModule, node: Node) -> str | None:
    """Name of the compact weight whose values a kernel call reads as its third argument."""
    if node.op != "call_function" or len(node.args) < 3 or not isinstance(node.args[2], Node):
        return None
    name = str(node.args[2].target)
    if node.args[2].op != "get_attr" or not name.endswith(_VALUES):
        return None
    name = name.removesuffix(_VALUES)
    return name if isinstance(fetch(gm, name), CompactWeight) else None
