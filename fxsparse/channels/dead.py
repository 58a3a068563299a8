"""Which channels compute nothing that the model needs, and why the other dead rows have to stay."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse.channels.constants import Constant, constant_channels, evaluate, flat, pads
from fxsparse.channels.dependency import Axis, Contraction
from fxsparse.channels.tracing import TracedChannels, trace_channels
from fxsparse.graph import Site, argument, fetch, is_parameter, operand_of, readers, sites, weight_source

_NOT_CONSTANT = (
    "what the next layer reads of it is not constant: live channels are added, or zeros at a border"
)


@dataclass
class Removal:
    """Which channels go, and why the others do not."""

    traced: TracedChannels
    constants: dict[Axis, Constant]
    labels: dict[Axis, np.ndarray]
    """{axis: the channel of every position}."""
    gone: np.ndarray
    """Over channels."""
    reasons: dict[int, str] = field(default_factory=dict)
    merges: list["Merge"] = field(default_factory=list)

    def kept(self, axis: Axis) -> np.ndarray:
        """Over the positions of an axis: whether each stays."""
        return ~self.gone[self.labels[axis]]

    def index(self, axis: Axis, like: Tensor) -> Tensor:
        """The positions of an axis that stay, on the device of a tensor."""
        return torch.from_numpy(np.flatnonzero(self.kept(axis))).to(like.device)


@dataclass(frozen=True)
class Merge:
    """Column `into` of a layer's weight takes over, times `ratio`, the column at `position` of a channel that goes."""

    reader: Contraction
    channel: int
    position: int
    into: int
    ratio: complex


def plan_removal(gm: GraphModule) -> Removal | None:
    """What can go at once; taking it out may let more go.

    None where no weight has a row or a column of zeros, so that nothing can go.
    """
    if not any(_has_dead(gm, site) for site in sites(gm)):
        return None
    traced = trace_channels(gm)
    labels = traced.graph.channels()
    count = 1 + max((int(at.max()) for at in labels.values() if len(at)), default=0)
    plan = Removal(traced, constant_channels(gm, traced), labels, np.zeros(count, dtype=bool))
    blocked = np.zeros(count, dtype=bool)
    for axis, reason in traced.graph.stops.items():
        _block(plan, blocked, labels[axis], reason)
    for contraction in traced.graph.contractions:
        at = labels[contraction.input]
        for why, bad in _not_foldable(gm, plan, contraction):
            _block(plan, blocked, at[bad], why)
    for site in sites(gm):
        step = traced.steps[site.node]
        if step.produces is not None:
            plan.gone[labels[step.produces]] = True
    plan.gone &= ~blocked
    _merge_at_borders(gm, plan)
    _keep_one(plan)
    return plan


def _has_dead(gm: GraphModule, site: Site) -> bool:
    nonzero = (flat(fetch(gm, str(site.weight.target)).detach()) != 0).any(2)
    return not bool(nonzero.any(0).all() and nonzero.any(1).all())


def _block(plan: Removal, blocked: np.ndarray, channels: np.ndarray, reason: str) -> None:
    for channel in channels[~blocked[channels]]:
        plan.reasons.setdefault(int(channel), reason)
    blocked[channels] = True


def _not_foldable(gm: GraphModule, plan: Removal, reader: Contraction) -> list[tuple[str, np.ndarray]]:
    """(reason, positions of the input) that a layer cannot do without."""
    read, known, nonzero = _read(gm, plan, reader)
    name = weight_name(reader)
    found = [(_NOT_CONSTANT, read & ~known)]
    reason = _only_zero(gm, reader)
    if reason is not None:
        found.append((f"{name} {reason}", read & known & nonzero))
    return found


def _read(gm: GraphModule, plan: Removal, reader: Contraction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Over the input of a layer: whether its weight has a nonzero there, a constant is there, and that is not 0."""
    read = _numpy((flat(evaluate(gm, weight_of(reader))) != 0).any(2).any(0))
    constant = plan.constants.get(reader.input)
    if constant is None:
        return read, np.zeros_like(read), np.zeros_like(read)
    return read, _numpy(constant.known), _numpy(constant.values != 0)


def _only_zero(gm: GraphModule, reader: Contraction) -> str | None:
    """Why a layer can take constants neither into its bias nor into a column, unless they are 0."""
    bias = argument(reader.node, 2, "bias")
    if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
        return "has a bias that is computed, which a constant cannot be folded into"
    if weight_source(gm, weight_of(reader)) is None or not (bias is None or is_parameter(gm, bias)):
        return "or its bias is not read as a Parameter, which a constant could be folded into"
    if readers(gm.graph, weight_name(reader)) > 1:
        return "has more than one call site, so that a constant cannot be folded into one bias"
    return None


def _merge_at_borders(gm: GraphModule, plan: Removal) -> None:
    """Of the channels that the same padded convolutions read as constants other than 0, keep one for all."""
    met: dict[int, dict[int, tuple[int, complex]]] = {}
    padded = [reader for reader in plan.traced.graph.contractions if pads(reader.node)]
    for index, reader in enumerate(padded):
        channels = plan.labels[reader.input]
        wanted = np.logical_and.reduce(_read(gm, plan, reader)) & plan.gone[channels]
        for position in np.flatnonzero(wanted):
            value = plan.constants[reader.input].values[position].item()
            seen = met.setdefault(int(channels[position]), {})
            if index in seen:
                plan.gone[channels[position]] = False
                plan.reasons[int(channels[position])] = f"{weight_name(reader)} reads it more than once"
            seen[index] = (int(position), value)
    by_readers: dict[tuple[int, ...], list[int]] = {}
    for channel in [channel for channel in met if plan.gone[channel]]:
        by_readers.setdefault(tuple(met[channel]), []).append(channel)
    for readers_of, channels in by_readers.items():
        first = max(channels, key=lambda channel: min(abs(value) for _, value in met[channel].values()))
        plan.gone[first] = False
        names = ", ".join(weight_name(padded[k]) for k in readers_of)
        plan.reasons[first] = f"with it {names} tells a constant from the zeros at the border"
        for channel in channels:
            for index, (position, value) in met[channel].items() if channel != first else ():
                into, other = met[first][index]
                plan.merges.append(Merge(padded[index], channel, position, into, value / other))


def _keep_one(plan: Removal) -> None:
    """No axis may become empty: one channel of it stays."""
    axes = [at for at in plan.labels.values() if len(at)]
    while True:
        empty = next((at for at in axes if plan.gone[at].all()), None)
        if empty is None:
            return
        plan.gone[empty[0]] = False
        plan.reasons[int(empty[0])] = "it is the last one, and a layer needs at least one"


def why_rows_stay(gm: GraphModule, plan: Removal, site: Site) -> list[str]:
    """The reason of every row of zeros that a layer has."""
    nonzero = (flat(evaluate(gm, argument(site.node, 1, "weight"))) != 0).any(2)
    produces = plan.traced.steps[site.node].produces
    dead = ~_numpy(nonzero.any(0 if site.op.startswith("conv_transpose") else 1))
    if produces is None:
        return [f"channels of {site.op} are not followed"] * int(dead.sum())
    channels = plan.labels[produces]
    live = set(channels[~dead].tolist())
    tied = "what it is added to or grouped with goes whole, and has live rows"
    return [tied if c in live else plan.reasons.get(c, "it is kept") for c in channels[dead].tolist()]


def weight_of(reader: Contraction) -> Any:
    """The node of the weight as a layer reads it."""
    return argument(reader.node, 1, "weight")


def weight_name(reader: Contraction) -> str:
    """The parameter below it."""
    node = weight_of(reader)
    while node.op != "get_attr":
        node = operand_of(node)
    return str(node.target)


def _numpy(mask: Tensor) -> np.ndarray:
    return mask.cpu().numpy()
