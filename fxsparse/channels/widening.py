"""New widths: how often every channel is there once the network is wider, and what size that gives every axis."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any

import networkx as nx
import numpy as np
from torch.fx import GraphModule

from fxsparse.channels.dependency import Axis, ChannelGraph
from fxsparse.channels.reading import Reader
from fxsparse.channels.resizing import resizing_step
from fxsparse.channels.tracing import add_step


@dataclass(frozen=True)
class Widths:
    """The size of every axis once channels are repeated."""

    labels: dict[Axis, np.ndarray]
    """{axis: the channel of every position}."""
    times: np.ndarray
    """Over channels: how often each is there, 1 where it is not widened."""
    kept: dict[int, str] = field(default_factory=dict)
    """{channel: why it is not widened}."""

    def size(self, axis: Axis) -> int:
        return int(self.times[self.labels[axis]].sum())

    def grows(self, axis: Axis) -> bool:
        """Whether an axis has another size now; False for those that are not known."""
        return axis in self.labels and self.size(axis) != len(self.labels[axis])

    def new(self, axis: Axis, size: Any) -> Any:
        """The new size of an axis, `size` where it is not known."""
        return self.size(axis) if axis in self.labels else size

    def before(self, axis: Axis, position: int) -> int:
        """New position of what was at `position`: the sizes of what came before it."""
        return int(self.times[self.labels[axis][:position]].sum())

    def repeats(self, axis: Axis) -> np.ndarray:
        """How often every position of an axis is there."""
        return self.times[self.labels[axis]]

    def reason(self, axis: Axis) -> str | None:
        """Why an axis does not grow; None where it does."""
        if self.size(axis) != len(self.labels[axis]):
            return None
        found = (self.kept.get(int(channel)) for channel in self.labels[axis])
        return next((reason for reason in found if reason is not None), "no layer makes it")


def widen(
    graphs: Sequence[GraphModule], widened: Callable[[int], int], heads: str, rounded: Callable[[int], str]
) -> Widths:
    """Widen everything that may be, and keep the rest.

    Args:
        graphs: those of all modes, in normal form with shapes in ``meta["val"]``; they are left as they are.
        widened: the new width for a width alone, which rounds down; what an axis is cut into (heads, groups of a
            grouped convolution) then rounds up, and multiples of the first width of the network stay multiples of it.
        heads: see `fxsparse.channels.resizing.resizing_step`.
        rounded: why a width alone stays as it is where it is rounded down to itself.
    """
    graph, sources = _trace(graphs, heads)
    labels = graph.channels()
    count = 1 + max((int(at.max()) for at in labels.values() if len(at)), default=0)
    stopped: dict[int, str] = {}
    for axis, reason in graph.stops.items():
        for channel in np.unique(labels[axis]):
            stopped.setdefault(int(channel), reason)
    widths = Widths(labels, np.ones(count, dtype=np.int64), stopped)
    free = []
    for group in _groups(sources, labels):
        reason = next(
            (stopped[c] for axis in group for c in np.unique(labels[axis]).tolist() if c in stopped), None
        )
        if reason is None:
            free.append(max(group, key=lambda axis: len(labels[axis])))
        else:
            for axis in group:
                stopped.update(
                    (int(channel), reason) for channel in labels[axis] if int(channel) not in stopped
                )
    target = _targets(widened, _multiples(labels), [len(labels[axis]) for axis in free])
    for axis in free:
        size = len(labels[axis])
        _repeat(widths.times, labels[axis], target(size))
        if not widths.grows(axis):
            first = len(labels[free[0]])
            reason = rounded(first if size % first == 0 else size)
            widths.kept.update((int(channel), reason) for channel in labels[axis])
    return widths


def _trace(graphs: Sequence[GraphModule], heads: str) -> tuple[ChannelGraph, list[Axis]]:
    """Sizes that change together, and the axes along which the outputs of layers and embeddings lie."""
    graph, sources = ChannelGraph(), []
    for gm in graphs:
        reader = Reader(gm)
        for node in gm.graph.nodes:
            step = resizing_step(reader, node, heads)
            add_step(graph, reader, node, step)
            reader.carried.update(
                tie.b for tie in step.ties if tie.a in reader.carried and tie.b.value is node
            )
            if step.produces is not None:
                reader.carried.add(step.produces)
                sources.append(step.produces)
    return graph, sources


def _groups(sources: Sequence[Axis], labels: dict[Axis, np.ndarray]) -> list[list[Axis]]:
    """Sources that share a channel, in the order of their first."""
    shared: nx.Graph = nx.Graph()
    for axis in sources:
        channels = np.unique(labels[axis]).tolist()
        shared.add_edges_from((axis, channel) for channel in channels)
    found = [{x for x in group if isinstance(x, Axis)} for group in nx.connected_components(shared)]
    return sorted(
        ([axis for axis in sources if axis in group] for group in found), key=lambda g: sources.index(g[0])
    )


def _multiples(labels: dict[Axis, np.ndarray]) -> dict[int, int]:
    """{width: what it has to stay a multiple of}, where a channel is at several positions of an axis."""
    found: dict[int, int] = {}
    for at in labels.values():
        times = np.unique(np.unique(at, return_counts=True)[1])
        if len(times) == 1 and times[0] > 1:
            found[len(at)] = lcm(found.get(len(at), 1), int(times[0]))
    return found


def _targets(
    widened: Callable[[int], int], multiples: dict[int, int], sizes: Sequence[int]
) -> Callable[[int], int]:
    """The new width for a width of the network."""

    def alone(width: int) -> int:
        multiple = multiples.get(width, 1)
        return -(-widened(width) // multiple) * multiple

    def target(width: int) -> int:
        first = sizes[0]
        return width // first * alone(first) if width % first == 0 else alone(width)

    return target


def _repeat(times: np.ndarray, at: np.ndarray, size: int) -> None:
    """Spread the new positions evenly over the channels of an axis, in place; all get at least one."""
    channels, positions = np.unique(at, return_counts=True)
    wanted = -(-size * len(channels) // int(positions.sum()))  # exact where all are equally often
    ends = np.arange(1, len(channels) + 1) * wanted // len(channels)
    times[channels] = np.maximum(1, np.diff(ends, prepend=0))
