"""The variant of the training graph that collects what an update needs."""

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from fxsparse import kernel
from fxsparse.graph import CONVOLUTION, SITE_OPS, argument, given_arguments, swaps_two_axes
from fxsparse.kernels import probe
from fxsparse.method import Method, Probe
from fxsparse.observed import ProbeSwitch, Watched
from fxsparse.skeleton import bind

_CHUNK = ("chunk", torch.chunk, torch.ops.aten.chunk.default)
_TRANSPOSED_CONV = ("stride", "padding", "output_padding", "groups", "dilation")


PROBES = {"train": "probe", "eval": "probe_eval"}
"""{mode: the name of its probe variant among a program's graphs}."""


def probe_graphs(
    graphs: Mapping[str, GraphModule], method: Method, switch: ProbeSwitch, tree: nn.Module
) -> dict[str, GraphModule]:
    """The probe variants of the train and the eval graph, bound to `tree`; one object where these are one.

    Training in eval mode (frozen norms, no dropout) has masks that move too.
    """
    made: dict[int, GraphModule] = {}
    for mode in PROBES:
        gm = graphs[mode]
        if id(gm) not in made:
            made[id(gm)] = bind(probe_variant(gm.graph, method, switch), tree)
    return {name: made[id(graphs[mode])] for mode, name in PROBES.items()}


def probe_variant(graph: Graph, method: Method, switch: ProbeSwitch) -> Graph:
    """A copy whose backward also leaves behind what the method's rule reads.

    That is the dense gradient in ``.grad`` of masked weights, and under the keys of `switch` the inputs and output
    gradients of compact ones; of masked ones too for a rule with Probe.GUIDED, where every op reads the whole weight.
    """
    graph = copy.deepcopy(graph)
    plain, dense_grad = method.reparam.function(False)[0], method.reparam.function(True)[0]
    guided = method.rule is not None and method.rule.probe is Probe.GUIDED
    compact = {kernel.registered()[name].run for name in kernel.ALL_TRAINING}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is plain:
            node.target = dense_grad
            readers = _readers(node) if guided else None
            for site, arguments in readers or ():
                _watch(site, str(node.args[0].target), arguments, switch)
        elif node.target in compact:
            name = str(node.args[2].target).removesuffix(".values")
            node.kwargs = {**node.kwargs, "probe_key": _watched(node, name, switch).key}
    return graph


def _watched(call: Node, name: str, switch: ProbeSwitch) -> Watched:
    """What the kernel call on a compact weight computes, in terms of the op that it stands for."""
    if "kernel_size" not in call.kwargs:
        return switch.watch(name)
    op = F.conv1d if len(call.kwargs["kernel_size"]) == 1 else F.conv2d  # type: ignore[arg-type]
    return switch.watch(name, op, {key: call.kwargs[key] for key in CONVOLUTION if key in call.kwargs})


def _readers(effective: Node) -> list[tuple[Node, dict[str, Any]]] | None:
    """The linear and convolution calls on an effective weight with their arguments; None if anything else reads it.

    A linear call on one of equal pieces, as in cross-attention, has ``part``, (which, of how many).
    """
    forms = [effective, *(user for user in effective.users if swaps_two_axes(user))]
    found: list[tuple[Node, dict[str, Any]]] = []
    for user in [user for form in forms for user in form.users if user not in forms]:
        calls = _calls_on_pieces(user) if _chunks(user, effective) else _whole_call(user, forms)
        if calls is None:
            return None
        found += calls
    return found


def _whole_call(user: Node, forms: list[Node]) -> list[tuple[Node, dict[str, Any]]] | None:
    if user.target not in SITE_OPS or argument(user, 1, "weight") not in forms:
        return None
    arguments = _arguments(user)
    return None if arguments is None else [(user, arguments)]


def _chunks(user: Node, effective: Node) -> bool:
    """Whether a call cuts the rows of a weight of known shape into equal pieces."""
    if user.target not in _CHUNK or argument(user, 2, "dim") not in (None, 0):
        return False
    weight, pieces = effective.meta.get("val"), argument(user, 1, "chunks")
    return user.args[0] is effective and weight is not None and weight.shape[0] % pieces == 0


def _calls_on_pieces(chunk: Node) -> list[tuple[Node, dict[str, Any]]] | None:
    pieces, found = argument(chunk, 1, "chunks"), []
    for piece in chunk.users:
        for user in piece.users:
            linear = user.target is F.linear and argument(user, 1, "weight") is piece
            if piece.target is not operator.getitem or not linear:
                return None
            found.append((user, {"part": (piece.args[1] % pieces, pieces)}))
    return found


def _arguments(site: Node) -> dict[str, Any] | None:
    """Keyword arguments of a call apart from input, weight and bias; None where the graph computes one of them."""
    op = SITE_OPS[site.target]  # type: ignore[index]
    names = () if site.target is F.linear else _TRANSPOSED_CONV if "transpose" in op else CONVOLUTION
    return given_arguments(site, names)


def _watch(site: Node, name: str, arguments: dict[str, Any], switch: ProbeSwitch) -> None:
    key = switch.watch(name, site.target, arguments).key  # type: ignore[arg-type]
    with site.graph.inserting_after(site):
        watched = site.graph.call_function(probe.watch, (site, argument(site, 0, "input"), key))
    watched.meta = dict(site.meta)
    site.replace_all_uses_with(watched, delete_user_cb=lambda user: user is not watched)
