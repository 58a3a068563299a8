"""The channel dependency graph: which positions of which tensors are one channel, and where that ends."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
from torch.fx import Node

Positions = np.ndarray
"""Positions along an axis, int64."""


@dataclass(frozen=True)
class Axis:
    """One dimension of one value: the output of a node, or, by its first name, a parameter or buffer."""

    value: Node | str
    dim: int

    def __str__(self) -> str:
        return f"{self.value}[{self.dim}]"


@dataclass(frozen=True, eq=False)
class Tie:
    """Position ``a_at[k]`` of `a` and position ``b_at[k]`` of `b` are one channel: neither goes without the other.

    Where an op made the tie, `a` is what it reads and `b` its output.
    """

    a: Axis
    b: Axis
    a_at: Positions
    b_at: Positions

    @staticmethod
    def whole(a: Axis, b: Axis, size: int) -> "Tie":
        """All positions, one to one."""
        every = np.arange(size)
        return Tie(a, b, every, every)


@dataclass(frozen=True)
class Contraction:
    """A linear layer or convolution that sums over the channels it reads: here a channel ends.

    ``input`` and ``weight`` are tied, position by position: a column of the weight goes with what it reads.
    """

    node: Node
    input: Axis
    weight: Axis


@dataclass
class ChannelGraph:
    """Axes as nodes, ties as edges of a networkx graph; see :func:`fxsparse.channels.trace_channels`."""

    axes: nx.MultiGraph = field(default_factory=nx.MultiGraph)
    """Nodes are :class:`Axis` with their ``size``; every edge holds its :class:`Tie` as ``tie``."""
    contractions: list[Contraction] = field(default_factory=list)
    stops: dict[Axis, str] = field(default_factory=dict)
    """{axis: why none of its positions may go alone}: it is an input or output of the model, an op mixes or counts
    its channels, or the op is not known."""

    def add(self, axis: Axis, size: int) -> None:
        self.axes.add_node(axis, size=size)

    def tie(self, tie: Tie) -> None:
        self.axes.add_edge(tie.a, tie.b, tie=tie)

    def contract(self, contraction: Contraction) -> None:
        self.contractions.append(contraction)
        self.tie(Tie.whole(contraction.input, contraction.weight, self.size(contraction.weight)))

    def stop(self, axis: Axis, reason: str) -> None:
        """Keep the first reason."""
        self.stops.setdefault(axis, reason)

    def size(self, axis: Axis) -> int:
        return self.axes.nodes[axis]["size"]

    def groups(self) -> list[set[Axis]]:
        """Axes that are tied, directly or through others; a change of one's size changes all of a group."""
        return [set(group) for group in nx.connected_components(self.axes)]

    def channels(self) -> dict[Axis, Positions]:
        """{axis: the channel of every position}; channels are numbered over the whole graph from 0."""
        first = np.cumsum([0, *map(self.size, self.axes)])
        labels = {
            axis: np.arange(start, end)
            for axis, start, end in zip(self.axes, first[:-1], first[1:], strict=True)
        }
        ties = [tie for _, _, tie in self.axes.edges(data="tie")]
        while _spread(labels, ties) or _spread(labels, reversed(ties)):
            pass
        return labels


def _spread(labels: dict[Axis, Positions], ties: Iterable[Tie]) -> bool:
    """Give both ends of every tie the lower number; whether anything changed."""
    changed = False
    for tie in ties:
        a, b = labels[tie.a], labels[tie.b]
        lower = np.minimum(a[tie.a_at], b[tie.b_at])
        if not (np.array_equal(a[tie.a_at], lower) and np.array_equal(b[tie.b_at], lower)):
            np.minimum.at(a, tie.a_at, lower)
            np.minimum.at(b, tie.b_at, lower)
            changed = True
    return changed
