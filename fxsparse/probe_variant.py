"""The variant of the training graph that collects what an update needs."""

import copy
from typing import Any

import torch.nn.functional as F
from torch.fx import Graph, Node

from fxsparse import kernel
from fxsparse.graph import CONVOLUTION, SITE_OPS, argument, given_arguments, swaps_two_axes
from fxsparse.kernels import probe
from fxsparse.method import Method, Probe
from fxsparse.observed import ProbeSwitch, Watched

_TRANSPOSED_CONV = ("stride", "padding", "output_padding", "groups", "dilation")


def probe_variant(graph: Graph, method: Method, switch: ProbeSwitch) -> Graph:
    """A copy whose backward also leaves behind what the method's rule reads.

    That is the dense gradient in ``.grad`` of masked weights, and under the keys of `switch` the inputs and output
    gradients of compact ones; of masked ones too for a rule with Probe.GUIDED, where every op reads the whole weight.
    """
    graph = copy.deepcopy(graph)
    plain, dense_grad = method.reparam.function(False)[0], method.reparam.function(True)[0]
    guided = method.rule is not None and method.rule.probe is Probe.GUIDED
    compact = {kernel.registered()[name].run for name in kernel.TRAINING.values()}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is plain:
            node.target = dense_grad
            readers = _readers(node) if guided else None
            for site in readers or ():
                _watch(site, str(node.args[0].target), switch)
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


def _readers(effective: Node) -> list[Node] | None:
    """The linear and convolution calls on an effective weight; None if anything else reads it, such as a slice."""
    forms = [effective, *(user for user in effective.users if swaps_two_axes(user))]
    found = [user for form in forms for user in form.users if user not in forms]
    return found if all(_reads_whole(user, forms) for user in found) else None


def _reads_whole(user: Node, forms: list[Node]) -> bool:
    return user.target in SITE_OPS and argument(user, 1, "weight") in forms and _arguments(user) is not None


def _arguments(site: Node) -> dict[str, Any] | None:
    """Keyword arguments of a call apart from input, weight and bias; None where the graph computes one of them."""
    op = SITE_OPS[site.target]  # type: ignore[index]
    names = () if site.target is F.linear else _TRANSPOSED_CONV if "transpose" in op else CONVOLUTION
    return given_arguments(site, names)


def _watch(site: Node, name: str, switch: ProbeSwitch) -> None:
    key = switch.watch(name, site.target, _arguments(site)).key  # type: ignore[arg-type]
    with site.graph.inserting_after(site):
        watched = site.graph.call_function(probe.watch, (site, argument(site, 0, "input"), key))
    watched.meta = dict(site.meta)
    site.replace_all_uses_with(watched, delete_user_cb=lambda user: user is not watched)
