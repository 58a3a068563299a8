"""An inference module as a graph of PyTorch's own ops on dense weights, zeros filled in."""

import copy
import operator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.graph import CodeGen

from fxsparse import entries_of, kernel
from fxsparse.errors import TraceError
from fxsparse.glue import GLUE
from fxsparse.graph import fetch, owner
from fxsparse.image_ops import COPIES
from fxsparse.lane_region import LaneRegion
from fxsparse.module import SparseModule
from fxsparse.packed import PackedWeight
from fxsparse.pipeline import Program
from fxsparse.sample_split import SampleSplit
from fxsparse.skeleton import bind, copy_structure


def raised(module: SparseModule) -> Program:
    """The graph of an inference module by ``F.linear``, ``F.conv2d`` and the like; it shares what is not packed.

    Values that were rounded stay so; whole batches run at once, in the order of memory that they come in.

    Raises:
        TraceError: it runs the model's own forward, which is dense already.
        CheckpointError: a weight that its kernel cannot give back.
    """
    program = module._emitted.program
    if program.tier == "walk":
        raise TraceError("this inference module runs the model's own forward: expected one with a graph")
    skeleton, graph = copy_structure(program.skeleton).eval(), copy.deepcopy(program.graphs["eval"].graph)
    _inline_regions(graph, skeleton)
    entries = {entry.run: entry for entry in kernel.registered().values()}
    plain = {kernel.glue(op.name): op.plain for op in GLUE}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in entries:
            _raise(node, entries[node.target])
        elif node.op == "call_function" and node.target in plain:
            node.target = plain[node.target]
        elif node.op == "call_function" and node.target in COPIES:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _fill_in(skeleton)
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    calling = graph._codegen
    graph.set_codegen(CodeGen() if isinstance(calling, SampleSplit) else calling)
    graph._codegen._body_transformer = None
    graph.lint()
    accepts = {mode: check for mode, check in program.accepts.items() if mode == "eval"}
    return Program(program.tier, skeleton, {"eval": bind(graph, skeleton)}, [], accepts=accepts)


def _inline_regions(graph: Graph, skeleton: nn.Module) -> None:
    for node in graph.find_nodes(op="call_module"):
        region = fetch(skeleton, str(node.target))
        if not isinstance(region, LaneRegion):
            continue
        inner: Graph = region.plain.graph
        made = dict(zip(inner.find_nodes(op="placeholder"), node.args, strict=True))
        with graph.inserting_before(node):
            result = graph.graph_copy(inner, made)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        holder, leaf = owner(skeleton, str(node.target))
        del holder._modules[leaf]


def _raise(node: Node, entry: kernel.Kernel) -> None:
    """Put the dense op, the sum and the activation in the place of a kernel's call."""
    graph, (x, bias, buffer, *_) = node.graph, node.args
    given = {
        k: v for k, v in node.kwargs.items() if k not in (*kernel.OF_THE_WEIGHT, "activation", "residual")
    }
    given.pop("probe_key", None)
    assert isinstance(buffer, Node)
    with graph.inserting_before(node):
        name = str(buffer.target).rpartition(".")[0]
        weight = buffer if entry.format == "dense" else graph.get_attr(name)
        op: Any = F.linear if entry.op == "linear" else _convolution(node)
        y = graph.call_function(op, (x, weight, bias), given)
        y.meta = dict(node.meta)
        residual, activation = node.kwargs.get("residual"), str(node.kwargs.get("activation", "none"))
        if residual is not None:
            y = graph.call_function(operator.add, (y, residual))
        if activation == "gelu_tanh":
            y = graph.call_function(F.gelu, (y,), {"approximate": "tanh"})
        elif activation != "none":
            y = graph.call_function(getattr(F, activation), (y,))
    node.replace_all_uses_with(y)
    graph.erase_node(node)


def _convolution(node: Node) -> Any:
    size = node.kwargs.get("kernel_size")
    return F.conv1d if isinstance(size, list | tuple) and len(size) == 1 else F.conv2d


def _fill_in(skeleton: nn.Module) -> None:
    """Let the tree hold dense Parameters in the places of packed weights; under all names of one the same."""
    made: dict[int, nn.Parameter] = {}
    for path, packed in list(skeleton.named_modules(remove_duplicate=False)):
        if not isinstance(packed, PackedWeight):
            continue
        if id(packed) not in made:
            device = next(packed.buffers()).device
            dense: Tensor = entries_of.values_of(packed.shape, entries_of.stored(packed)).to(device)
            made[id(packed)] = nn.Parameter(dense, requires_grad=False)
        module, leaf = owner(skeleton, path)
        del module._modules[leaf]
        module.register_parameter(leaf, made[id(packed)])
