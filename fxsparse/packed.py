"""The weight of an inference artefact: a kernel's buffers in the place of the dense Parameter."""

from collections.abc import Mapping

from torch import Tensor, nn

from fxsparse.graph import owner


class PackedWeight(nn.Module):
    """The buffers of one weight as its kernel reads them, under the weight's own name.

    Attributes:
        kernel: name of the kernel that packed them.
        shape: dense shape of the weight.
    """

    def __init__(self, kernel: str, shape: tuple[int, ...], packed: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.kernel = kernel
        self.shape = shape
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
