"""Replace dense ops on compact weights by sparse kernel calls."""

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxsparse import kernel
from fxsparse.formats import block_index, bsr
from fxsparse.graph import (
    argument,
    attribute_nodes,
    convolution_arguments,
    fetch,
    insert_get_attr,
    owner,
    replace,
)
from fxsparse.initial import capacity, initial_positions, note_drawn, stored_values
from fxsparse.kernel import Kernel
from fxsparse.pipeline import PassContext, WeightSpec
from fxsparse.storage import CompactWeight

LINEAR = ("crow", "cols", "ccol", "rows_t", "perm")
CONVOLUTION = ("crow", "cols")
BLOCKS = tuple(f"block_{part}" for part in block_index.PARTS)
"""What the kernels read of the index, in order."""


@dataclass(frozen=True)
class LowerKernels:
    """A linear or convolution of (x, w, b) becomes the training kernel that was chosen, on ``w.values``.

    The dense Parameter leaves the tree.  The user's own module keeps its Parameter: only the skeleton changes.
    """

    name: ClassVar[str] = "lower-kernels"
    after: ClassVar[tuple[str, ...]] = ("choose-storage", "insert-reparam")
    preserves_function: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        rewrites = 0
        compact = [name for name, decision in ctx.decisions.items() if decision.storage == "compact"]
        if not any(isinstance(fetch(ctx.program.skeleton, name), CompactWeight) for name in compact):
            note_drawn(ctx, compact)
        for name, decision in ctx.decisions.items():
            if decision.storage == "compact":
                compact_in_tree(ctx, name)
                # Storage was only chosen where linear ops are the only readers, in every graph of the program.
                readers = [user for node in attribute_nodes(gm.graph, name) for user in node.users]
                trained = kernel.registered()[decision.kernel]
                rewrites += sum(_lower(gm, node, name, ctx.weights[name], trained) for node in readers)
        return rewrites


def compact_in_tree(ctx: PassContext, name: str) -> None:
    """Put a CompactWeight in the place of the skeleton's dense Parameter, once."""
    module, leaf = owner(ctx.program.skeleton, name)
    if isinstance(fetch(ctx.program.skeleton, name), CompactWeight):
        return
    positions = initial_positions(ctx, name)
    parameter = module._parameters[leaf]
    assert isinstance(parameter, nn.Parameter)
    values = stored_values(ctx, name, positions)
    decision = ctx.decisions[name]
    side = bsr.side_of(decision.pattern) if decision.format == "bsr" else None
    compact = CompactWeight(tuple(parameter.shape), positions, values, capacity(ctx, name), side)
    compact.values.requires_grad_(parameter.requires_grad)
    del module._parameters[leaf]
    module.add_module(leaf, compact.train(module.training))


def _lower(gm: GraphModule, node, name: str, spec: WeightSpec, trained: Kernel) -> int:
    graph = gm.graph
    bias = argument(node, 2, "bias")
    values = insert_get_attr(graph, f"{name}.values", node)
    parts, arguments = BLOCKS if trained.format == "bsr" else LINEAR, {}
    if spec.op != "linear":
        parts, arguments = CONVOLUTION, convolution_arguments(node, spec.shape)
    index = [_part(graph, name, part, node) for part in parts]
    old = attribute_nodes(graph, name)
    replace(node, trained.run, (argument(node, 0, "input"), bias, values, *index), **arguments)
    for weight in old:
        if not weight.users:
            graph.erase_node(weight)
    return 1


def _part(graph: Graph, name: str, part: str, node: Node) -> Node:
    """A part of the index; the columns are one of two rows of what a checkpoint holds."""
    if part != "cols":
        return insert_get_attr(graph, f"{name}.{part}", node)
    indices = insert_get_attr(graph, f"{name}.indices", node)
    with graph.inserting_before(node):
        return graph.call_function(operator.getitem, (indices, 1))
