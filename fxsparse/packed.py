"""The weight of an inference artefact: a kernel's buffers in the place of the dense Parameter."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse.graph import Site, argument, fetch, insert_get_attr, owner, readers


class PackedWeight(nn.Module):
    """The buffers of one weight as its kernel reads them, under the weight's own name.

    Attributes:
        kernel: name of the kernel that packed them.
        shape: dense shape of the weight.
        lanes: what ``kernel.glue("pack_lanes")`` packed them for in its place, if it did: the convolution's arguments.
    """

    def __init__(self, kernel: str, shape: tuple[int, ...], packed: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kernel = kernel
        self.shape = shape
        self.lanes: Mapping[str, Any] | None = None
        for name, tensor in packed.items():
            self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.shape))}, {self.kernel}"


def replace_parameter(root: nn.Module, name: str, value: Tensor) -> None:
    """Let the tree hold a new Parameter under `name` and every other name of the one there; that one is not changed."""
    module, leaf = owner(root, name)
    old, new = module._parameters.get(leaf), nn.Parameter(value.detach(), requires_grad=False)
    module._parameters[leaf] = new
    if old is not None:
        _for_every_name(root, old, new)


def set_bias(gm: GraphModule, site: Site, bias: Tensor) -> None:
    """Give a call site this bias: in the place of its own Parameter, or as a new one where it has none or shares it."""
    node, old = site.node, argument(site.node, 2, "bias")
    if old is not None and readers(gm.graph, str(old.target)) == 1:
        replace_parameter(gm, str(old.target), bias)
        return
    path, _, leaf = str(site.weight.target).rpartition(".")
    module, _ = owner(gm, str(site.weight.target))
    free = leaf == "weight" and module._parameters.get("bias", 0) is None
    name = f"{path}." * bool(path) + ("bias" if free else f"{leaf}_folded_bias")
    replace_parameter(gm, name, bias)
    new = insert_get_attr(gm.graph, name, node)
    new.meta["val"] = fetch(gm, name)
    kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
    node.args, node.kwargs = (*node.args[:2], new, *node.args[3:]), kwargs


def replace_buffer(root: nn.Module, name: str, value: Tensor) -> None:
    """Let the tree hold another tensor under `name` and every other name of the buffer there."""
    module, leaf = owner(root, name)
    old = module._buffers[leaf]
    for holder in root.modules():
        for key in [key for key, held in holder._buffers.items() if held is old]:
            holder._buffers[key] = value


def drop_tensor(root: nn.Module, name: str) -> None:
    """Let the tree hold nothing under `name`: a Parameter (with its other names) or a buffer."""
    module, leaf = owner(root, name)
    old = module._parameters.get(leaf)
    if old is not None:
        _for_every_name(root, old, None)
    if leaf in module._buffers:
        module._buffers[leaf] = None


def put_packed(root: nn.Module, name: str, packed: PackedWeight) -> None:
    """Put a PackedWeight in the place of the Parameter at `name`, under every name of it."""
    module, leaf = owner(root, name)
    old = module._parameters[leaf]
    for holder in root.modules():
        for key in [key for key, value in holder._parameters.items() if value is old]:
            del holder._parameters[key]
            holder.add_module(key, packed)


def _for_every_name(root: nn.Module, old: nn.Parameter, new: nn.Parameter | None) -> None:
    for module in root.modules():
        for key in [key for key, value in module._parameters.items() if value is old]:
            module._parameters[key] = new
