"""Run the first part of a network of images with samples, or parts of them, in vector lanes, where that is faster."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from fxsparse import kernel
from fxsparse.formats import column_blocks
from fxsparse.glue import GLUE
from fxsparse.graph import CONVOLUTION, eliminate_dead_code, fetch, given_arguments
from fxsparse.image_ops import ADDS, COPIES, POINTWISE, POINTWISE_MODULES
from fxsparse.inputs import has_meta, split_inputs
from fxsparse.lane_region import LaneRegion, Stage
from fxsparse.packed import PackedWeight
from fxsparse.passes.fuse_epilogue import activation_after
from fxsparse.passes.select_kernels import ADVANTAGE
from fxsparse.pipeline import PassContext
from fxsparse.sample_split import SampleSplit
from fxsparse.timing import interleaved_quartiles

LANES = 16
GRIDS = (4, 2, 1)
"""Parts along each side of a sample: as many as fit, since few samples at a time leave more in the caches."""
SHORTEST = 7
"""Pixels of a row of a part at least, where there is more than one."""

_DENSE = {F.conv2d, torch.conv2d}
_NEW_MEMORY = ("to_lanes", "join_lanes", "csr_conv_lanes", "conv_lanes", "max_pool_lanes")
"""Functions whose result is no other tensor's memory, and which only read what they are given, but for a residual that
nothing reads after them."""


@dataclass(frozen=True)
class PackLanes:
    """What a network does first becomes one call of a `LaneRegion`, where that measured faster; every op by itself.

    Convolutions with their epilogues, max pooling, sums of two tensors and pointwise ops are known.  Sparse weights are
    packed again, in blocks of few channels, and their convolutions write over a residual that nothing reads afterwards.
    """

    name: ClassVar[str] = "pack-lanes"
    after: ClassVar[tuple[str, ...]] = ("split-samples",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of ops that went into the region."""
        x = _batch(gm, ctx)
        if x is None:
            return 0
        calls = _Calls(gm, x)
        spans = list(calls.spans())
        if not any(calls.is_sparse(node) for span in spans for node in span.nodes):
            return 0
        found = _build(gm, calls, spans, tuple(x.shape[1:]))
        times = found.times(x)
        if times["lanes"] > ADVANTAGE * times["plain"]:
            ctx.notes.append(f"{found.text()} would take {times['lanes'] / times['plain']:.2f} of the time")
            return 0
        _put(gm, ctx, found)
        ctx.notes.append(f"{found.text()}: {times['plain'] / times['lanes']:.2f}x of what they took")
        return len(found.nodes)


def _batch(gm: GraphModule, ctx: PassContext) -> Tensor | None:
    """The only example input, if it is a batch of images in fp32 on the CPU."""
    if ctx.program.tier == "walk" or ctx.example_inputs is None or has_meta(ctx.example_inputs):
        return None
    args, kwargs = split_inputs(ctx.example_inputs)
    if len(args) != 1 or kwargs or type(gm.graph._codegen) not in (CodeGen, SampleSplit):
        return None
    x = args[0]
    return x if isinstance(x, Tensor) and x.is_cpu and x.dim() == 4 and x.dtype == torch.float32 else None


@dataclass(frozen=True)
class _Span:
    """Nodes one after the other that run in lanes of one kind."""

    grid: int
    nodes: tuple[Node, ...]


class _Shapes(Interpreter):
    """The shape of every tensor of a graph."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = tuple(value.shape)
        return value


@dataclass(frozen=True)
class _Call:
    """An op of images: its inputs, what it is given and the function that runs it in lanes."""

    run: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stride: tuple[int, int] = (1, 1)


class _Calls:
    """The ops of a graph as lanes run them."""

    def __init__(self, gm: GraphModule, x: Tensor) -> None:
        shapes = _Shapes(gm)
        with torch.no_grad():
            shapes.run(x)
        self.gm, self.shapes, self.samples = gm, shapes.found, len(x)
        self.sparse = kernel.registered()["cpu-csr-conv"].run
        self.dense = {kernel.registered()[name].run for name in ("cpu-depthwise", "onednn-conv")}
        self.nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]

    def is_sparse(self, node: Node) -> bool:
        """Whether a node is a convolution with a sparse weight."""
        return node.target is self.sparse

    def spans(self) -> Iterator[_Span]:
        """What can run in lanes from the first node on, with the largest grids first."""
        begin = 0
        for grid in GRIDS:
            if self.samples % (LANES // grid**2):
                return
            at, cuts = begin, [begin]
            while at < len(self.nodes) and self._fits(self.nodes[at], grid):
                at += 1
                cuts += [at] if self._is_cut(at) else []
            end = self._narrowest(cuts)
            if end > begin:
                yield _Span(grid, tuple(self.nodes[begin:end]))
            begin = end

    def _narrowest(self, cuts: list[int]) -> int:
        """The last cut, or the one before where less than half as much goes from one layout to the next there."""
        if len(cuts) < 3 or cuts[-1] == len(self.nodes):
            return cuts[-1]
        sizes = [prod(self.shapes[self.nodes[cut - 1]]) for cut in cuts[-2:]]
        return cuts[-2] if 2 * sizes[0] < sizes[1] else cuts[-1]

    def _is_cut(self, end: int) -> bool:
        """Whether all later nodes read no more of the nodes before `end`, and of the input, than the last of them."""
        later = {*self.nodes[end:], self.gm.graph.output_node()}
        before = [*self.gm.graph.find_nodes(op="placeholder"), *self.nodes[: end - 1]]
        return not any(user in later for node in before for user in node.users)

    def _fits(self, node: Node, grid: int) -> bool:
        call = self.read(node)
        if call is None or len(self.shapes.get(node, ())) != 4:
            return False
        given = [
            arg
            for arg in (*call.args, *call.kwargs.values())
            if isinstance(arg, Node) and arg.op != "get_attr"
        ]
        sizes = {self.shapes[source][2:] for source in given}
        out = self.shapes[node][2:]
        if grid == 1:
            return True
        if any(n % grid or n // grid < SHORTEST for size in (*sizes, out) for n in size):
            return False
        wanted = tuple(n * s for n, s in zip(out, call.stride, strict=True))
        return self.shapes[given[0]][2:] == wanted

    def read(self, node: Node) -> _Call | None:
        """None for an op that lanes do not know."""
        lanes = kernel.glue
        if node.target is self.sparse:
            return _Call(
                lanes("csr_conv_lanes"), node.args, dict(node.kwargs), _pair(node.kwargs.get("stride", 1))
            )
        if node.target in self.dense:
            return _Call(
                lanes("conv_lanes"), node.args, dict(node.kwargs), _pair(node.kwargs.get("stride", 1))
            )
        if node.target in COPIES:
            return _Call(None, node.args, {})
        if node.target in _DENSE:
            return self._dense(node)
        for op in GLUE:
            if op.name == "max_pool2d" and (found := op.read(self.gm, node)) is not None:
                return self._pooling(found.inputs, found.given)
        if node.target is lanes("max_pool2d"):
            return self._pooling(node.args, dict(node.kwargs))
        images = all(source.op != "get_attr" for source in node.all_input_nodes)
        adds = node.target in ADDS and len(node.all_input_nodes) == len(node.args) == 2 and not node.kwargs
        pointwise = node.op == "call_function" and node.target in POINTWISE and len(node.all_input_nodes) == 1
        if adds and (not images or len({self.shapes[source] for source in node.all_input_nodes}) > 1):
            return None
        module = node.op == "call_module" and type(fetch(self.gm, str(node.target))) in POINTWISE_MODULES
        return _Call(None, node.args, dict(node.kwargs)) if adds or pointwise or module else None

    def _dense(self, node: Node) -> _Call | None:
        given = given_arguments(node, CONVOLUTION)
        source, weight, *bias = node.args
        if given is None or not isinstance(weight, Node) or weight.op != "get_attr" or len(node.args) > 3:
            return None
        shape = fetch(self.gm, str(weight.target)).shape
        given |= {"kernel_size": tuple(shape[2:]), "in_channels": shape[1] * given.get("groups", 1)}
        added = bias[0] if bias else node.kwargs.get("bias")
        return _Call(kernel.glue("conv_lanes"), (source, added, weight), given, _pair(given.get("stride", 1)))

    def _pooling(self, inputs: Sequence[Any], given: dict[str, Any]) -> _Call:
        stride = given.get("stride")
        return _Call(
            kernel.glue("max_pool_lanes"),
            tuple(inputs),
            given,
            _pair(given["kernel_size"] if stride is None else stride),
        )


def _pair(number: Any) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else (number[0], number[-1])


@dataclass(frozen=True)
class _Found:
    """A region before it is put into the graph."""

    region: LaneRegion
    spans: tuple[_Span, ...]
    nodes: tuple[Node, ...]
    weights: tuple[Node, ...]
    values: tuple[Tensor, ...]
    """Of the weights, as the graph has them."""
    packed: dict[str, dict[str, Tensor]]
    """{name of a weight: its buffers for lanes}"""
    windows: dict[str, dict[str, Any]]
    """{name of a weight: what it was packed for}"""

    def for_lanes(self) -> list[Tensor]:
        """The values with packed weights in the places of those as they were."""
        new = {f"{name}.{key}": value for name, held in self.packed.items() for key, value in held.items()}
        return [
            new.get(str(node.target), value) for node, value in zip(self.weights, self.values, strict=True)
        ]

    def times(self, x: Tensor) -> dict[str, float]:
        """Microseconds of the region in lanes, and of its ops as they were."""
        region, weights = self.region, self.for_lanes()
        plain = LaneRegion(region.plain, region.at_once, _stages(region), (0, 0, 0))
        calls = {"lanes": lambda: region(x, *weights), "plain": lambda: plain(x, *self.values)}
        with torch.no_grad():
            for call in calls.values():
                call()
            return interleaved_quartiles(calls, rounds=21, seconds=3.0)

    def text(self) -> str:
        """What it is, for a note."""
        parts = [
            f"{len(span.nodes)} in {span.grid} x {span.grid} parts of {LANES // span.grid**2}"
            for span in self.spans
        ]
        return f"{len(self.nodes)} ops in lanes ({', '.join(parts)} samples)"


def _stages(region: LaneRegion) -> list[Stage]:
    return [Stage(*plan, piece) for plan, piece in zip(region.plan, region.pieces, strict=True)]  # type: ignore[arg-type]


def _build(gm: GraphModule, calls: _Calls, spans: Sequence[_Span], size: tuple[int, ...]) -> _Found:
    nodes = tuple(node for span in spans for node in span.nodes)
    weights = tuple(dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s.op == "get_attr"))
    source = next(iter(gm.graph.find_nodes(op="placeholder")))
    plain = _plain(gm, source, nodes, weights)
    stages = [
        Stage(LANES // span.grid**2, span.grid, _piece(gm, calls, source, spans, k, weights))
        for k, span in enumerate(spans)
    ]
    codegen = gm.graph._codegen
    region = LaneRegion(plain, codegen.samples if isinstance(codegen, SampleSplit) else None, stages, size)
    packed, windows = {}, {}
    for node in nodes:
        if calls.is_sparse(node):
            name = str(node.args[2].target).removesuffix(".values")  # type: ignore[union-attr]
            windows[name] = {k: v for k, v in node.kwargs.items() if k not in ("activation", "residual")}
            packed[name] = _packed_again(fetch(gm, name), windows[name])
    values = tuple(fetch(gm, str(node.target)).detach() for node in weights)
    return _Found(region, tuple(spans), nodes, weights, values, packed, windows)


def _packed_again(weight: PackedWeight, given: dict[str, Any]) -> dict[str, Tensor]:
    held = column_blocks.ColumnBlocks(weight.values, weight.start, weight.columns)  # type: ignore[arg-type]
    columns = torch.Size(weight.shape[1:]).numel()
    return kernel.glue("pack_lanes")(column_blocks.to_dense(held, columns), **given)


def _inputs(graph: Graph, source: Node, weights: Sequence[Node]) -> dict[Node, Node]:
    return {node: graph.placeholder(node.name) for node in (source, *weights)}


def _plain(gm: GraphModule, source: Node, nodes: Sequence[Node], weights: Sequence[Node]) -> GraphModule:
    graph = Graph()
    made = _inputs(graph, source, weights)
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[nodes[-1]])
    return _module(gm, graph)


def _piece(
    gm: GraphModule, calls: _Calls, source: Node, spans: Sequence[_Span], stage: int, weights: Sequence[Node]
) -> GraphModule:
    """The nodes of spans[stage], as a function of the images or of what the stage before gives, and the weights."""
    graph, span = Graph(), spans[stage]
    first = spans[stage - 1].nodes[-1] if stage else source
    made = _inputs(graph, first, weights)
    if stage == 0:
        made[first] = graph.call_function(kernel.glue("to_lanes"), (made[first], span.grid))
    else:
        grids = spans[stage - 1].grid, span.grid
        made[first] = graph.call_function(kernel.glue("join_lanes"), (made[first], *grids))
    fused: set[Node] = set()
    for node in span.nodes:
        call = calls.read(node)
        assert call is not None
        if node in fused or node.target in COPIES:  # lanes have an order of their own
            made[node] = made[node.all_input_nodes[0]]
        elif call.run is None:
            made[node] = graph.node_copy(node, made.__getitem__)
        else:
            kwargs = {**call.kwargs, "grid": span.grid}
            following = activation_after(gm, node) if node.target in _DENSE else ""
            if not isinstance(following, str) and following[1] in span.nodes:
                kwargs["activation"] = following[0]
                fused.add(following[1])
            args, kwargs = map_arg((call.args, kwargs), made.__getitem__)
            made[node] = graph.call_function(call.run, args, kwargs)
    last = made[span.nodes[-1]]
    if stage == len(spans) - 1:
        last = graph.call_function(kernel.glue("from_lanes"), (last, span.grid))
    graph.output(last)
    _write_over_residuals(graph)
    return _module(gm, graph)


def _write_over_residuals(graph: Graph) -> None:
    """Let sparse convolutions write over a residual that nothing reads after them."""
    known = {kernel.glue(name) for name in _NEW_MEMORY}
    order = {node: k for k, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=kernel.glue("csr_conv_lanes")):
        held = node.kwargs.get("residual")
        if not isinstance(held, Node) or held.target not in known or held is node.args[0]:
            continue
        if all(user.target in known and order[user] <= order[node] for user in held.users):
            node.update_kwarg("over_residual", True)


def _module(gm: GraphModule, graph: Graph) -> GraphModule:
    held = {str(node.target): fetch(gm, str(node.target)) for node in graph.find_nodes(op="call_module")}
    return GraphModule(held, graph)


def _put(gm: GraphModule, ctx: PassContext, found: _Found) -> None:
    """Let `gm` call the region in the place of its nodes."""
    skeleton = ctx.program.skeleton
    name = next(f"_lanes_{k}" for k in range(10**6) if not hasattr(skeleton, f"_lanes_{k}"))
    skeleton.add_module(name, found.region)
    for weight, buffers in found.packed.items():
        held = fetch(skeleton, weight)
        held.lanes = found.windows[weight]
        for key, value in buffers.items():
            held.register_buffer(key, value)
    last, graph = found.nodes[-1], gm.graph
    source = next(iter(graph.find_nodes(op="placeholder")))
    with graph.inserting_before(last.next):
        weights = [graph.get_attr(str(node.target)) for node in found.weights]
        call = graph.call_module(name, (source, *weights))
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    for node in reversed(found.nodes):
        graph.erase_node(node)
    eliminate_dead_code(graph)
    graph.set_codegen(CodeGen())
