"""Bring the evaluation graph of a training module back to ops on plain dense weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxsparse.graph import (
    CONVOLUTION,
    attribute_nodes,
    eliminate_dead_code,
    fetch,
    insert_get_attr,
    owner,
    replace,
)
from fxsparse.packed import replace_parameter
from fxsparse.pipeline import PassContext
from fxsparse.storage import CompactWeight

_VALUES = ".values"
_OPS = {2: F.linear, 3: F.conv1d, 4: F.conv2d}
"""By the dimensions of the weight."""


@dataclass(frozen=True)
class FoldMasks:
    """reparam(w, mask) becomes the effective weight, and the product of a compact weight the dense op that it was.

    The skeleton gets new Parameters; those of the training module are left as they are.  So selection starts from
    one normal form whatever training held.
    """

    name: ClassVar[str] = "fold-masks"
    after: ClassVar[tuple[str, ...]] = ()
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of rewritten nodes; 0 on a model that is no training module."""
        rewrites = _fold_masked(gm, ctx) + _fold_compact(gm)
        if rewrites:
            eliminate_dead_code(gm.graph)
        return rewrites


def _fold_masked(gm: GraphModule, ctx: PassContext) -> int:
    if ctx.plan is None:
        return 0
    reparam = ctx.plan.method.reparam
    function, _ = reparam.function(dense_grad=False)
    found = gm.graph.find_nodes(op="call_function", target=function)
    masks = {str(node.args[0].target): str(node.args[1].target) for node in found}
    for name, mask in masks.items():
        replace_parameter(gm, name, reparam.fold(fetch(gm, name).detach(), fetch(gm, mask)))
        module, leaf = owner(gm, mask)
        del module._buffers[leaf]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    return len(found)


def _fold_compact(gm: GraphModule) -> int:
    found = [(node, name) for node in gm.graph.nodes if (name := _compact_name(gm, node)) is not None]
    for node, name in found:
        compact = fetch(gm, name)
        if isinstance(compact, CompactWeight):
            module, leaf = owner(gm, name)
            del module._modules[leaf]
            replace_parameter(gm, name, compact.dense())
        known = attribute_nodes(gm.graph, name)
        weight = known[0] if known else insert_get_attr(gm.graph, name, node)
        op = _OPS[fetch(gm, name).dim()]
        given = {key: value for key, value in node.kwargs.items() if key in CONVOLUTION}
        replace(node, op, (node.args[0], weight, node.args[1]), **given)
    return len(found)


def _compact_name(gm: GraphModule, node: Node) -> str | None:
    """Name of the compact weight whose values a kernel call reads as its third argument."""
    if node.op != "call_function" or len(node.args) < 3 or not isinstance(node.args[2], Node):
        return None
    name = str(node.args[2].target)
    if node.args[2].op != "get_attr" or not name.endswith(_VALUES):
        return None
    name = name.removesuffix(_VALUES)
    return name if isinstance(fetch(gm, name), CompactWeight) else None
