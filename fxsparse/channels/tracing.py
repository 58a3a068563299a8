"""Read the channel dependency graph off an fx graph."""

from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from fxsparse.channels.dependency import Axis, ChannelGraph
from fxsparse.channels.reading import Reader
from fxsparse.channels.rules import Step, step_of


@dataclass
class TracedChannels:
    """The channel dependency graph, and how it was read."""

    graph: ChannelGraph = field(default_factory=ChannelGraph)
    steps: dict[Node, Step] = field(default_factory=dict)
    """What every node does to channels, in graph order."""
    carried: set[Axis] = field(default_factory=set)
    """Axes of node outputs along which lie outputs of a linear layer or convolution."""
    overwritten: set[Node] = field(default_factory=set)
    """Values that a later node changes in place although others read them."""


def trace_channels(gm: GraphModule) -> TracedChannels:
    """Which positions of all values and parameters are one channel, and where channels end.

    `gm` is in normal form (functionalize) with shapes in ``meta["val"]`` (infer-shapes); it is not changed.  In
    training mode BatchNorm and dropout tie channels too, and stop them.  Axes whose size is a symbol, such as the
    batch, are left out.  Inputs and outputs of the model stop channels, and so does whatever an op without a rule reads
    or returns.
    """
    reader = Reader(gm)
    traced = TracedChannels(carried=reader.carried)
    for node in gm.graph.nodes:
        traced.steps[node] = step = step_of(reader, node)
        add_step(traced.graph, reader, node, step)
        reader.carried.update(tie.b for tie in step.ties if tie.a in reader.carried and tie.b.value is node)
        if step.produces is not None:
            reader.carried.add(step.produces)
        for value in reader.overwritten(node):
            traced.overwritten.add(value)
            _stop_rest(
                traced.graph, reader, value, set(), f"{node.name} changes it in place, which others see"
            )
    return traced


def add_step(graph: ChannelGraph, reader: Reader, node: Node, step: Step) -> None:
    """Ties and stops of one node; an axis that no tie mentions is a stop."""
    read = [] if step.silent else node.all_input_nodes
    for value in (*read, node):
        _add_axes(graph, reader, value)
    named = {*step.stops, *step.free}
    for tie in step.ties:
        named |= {tie.a, tie.b}
        graph.tie(tie)
    if step.contraction is not None:
        named |= {step.contraction.input, step.contraction.weight}
        graph.contract(step.contraction)
    for axis, reason in step.stops.items():
        if axis in graph.axes:  # not of a size that is a symbol
            graph.stop(axis, reason)
    reason = step.reason or f"{node.name} reads it whole"
    for value in read if node.op == "get_attr" else (*read, node):
        _stop_rest(graph, reader, value, named, reason)
    _stop_inner(graph, reader, node, named)


def _add_axes(graph: ChannelGraph, reader: Reader, value: Node) -> None:
    for dim, size in enumerate(reader.shape(value) or ()):
        if isinstance(size, int):
            graph.add(reader.axis(value, dim), size)


def _stop_rest(graph: ChannelGraph, reader: Reader, value: Node, named: set[Axis], reason: str) -> None:
    for dim in range(reader.rank(value)):
        axis = reader.axis(value, dim)
        if axis in graph.axes and axis not in named:
            graph.stop(axis, reason)


def _stop_inner(graph: ChannelGraph, reader: Reader, node: Node, named: set[Axis]) -> None:
    """Tensors inside a module that runs as one: those that no rule speaks of keep their shapes."""
    module = reader.module(node)
    tensors = [] if module is None else [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        for dim, size in enumerate(tensor.shape):
            axis = Axis(reader.name(f"{node.target}.{name}"), dim)
            graph.add(axis, size)
            if axis not in named:
                graph.stop(axis, f"it is inside {node.target}, which runs as one module")
