"""Where the nodes of a graph fall into blocks that hand each other as few values as possible."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from math import inf
from typing import Any

from torch.fx import Node

from fxsparse.graph import Site


def dependent(nodes: Sequence[Node]) -> set[Node]:
    """Nodes whose values depend on the inputs; others are the same for every batch."""
    found: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def cuts(place: Mapping[Node, int], moving: Collection[Node], found: Sequence[Site]) -> list[int]:
    """Where blocks begin among the nodes, and the end of the last.

    Between two sites that follow each other the place with the fewest values alive counts, if no weight is read on
    both sides.  It is a cut if the neighbouring places have no fewer; the first is compared with the inputs.
    """
    alive, shut = _alive(place, moving), _shut(found, place)
    at = sorted(place[site.node] for site in found)
    if not at:
        return [0, 0]
    inputs = sum(node.op == "placeholder" for node in place)
    gaps = []
    for before, after in itertools.pairwise(at):
        best = min(range(before + 1, after + 1), key=alive.__getitem__)
        gaps.append((inf if shut[best] else alive[best], best))
    fewest = [min(alive[inputs : at[0] + 1]), *(count for count, _ in gaps), inf]
    inner = [
        best
        for (count, best), left, right in zip(gaps, fewest[:-2], fewest[2:], strict=True)
        if count < inf and count <= left and count <= right
    ]
    return [0, *inner, at[-1] + 1]


def _alive(place: Mapping[Node, int], moving: Collection[Node]) -> list[int]:
    """How many values that depend on the inputs are alive in front of each node."""
    change = [0] * (len(place) + 1)
    for node in moving:
        change[place[node] + 1] += 1
        change[last_user(node, place) + 1] -= 1
    return list(itertools.accumulate(change))


def last_user(node: Node, place: Mapping[Node, int]) -> int:
    """Where the last node that reads `node` stands; where it stands itself if none does."""
    return max((place[user] for user in node.users), default=place[node])


def _shut(found: Sequence[Site], place: Mapping[Node, int]) -> list[bool]:
    """Whether a weight is read both before a node and from it on."""
    change = [0] * (len(place) + 1)
    reads: dict[Any, list[int]] = {}
    for site in found:
        reads.setdefault(site.weight.target, []).append(place[site.node])
    for where in reads.values():
        change[min(where) + 1] += 1
        change[max(where) + 1] -= 1
    return [held > 0 for held in itertools.accumulate(change)]
