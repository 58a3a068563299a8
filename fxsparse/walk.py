"""Emission on the module-walk tier: the user's own forward runs, each sparse leaf multiplies by its masked weight."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxsparse.graph import owner
from fxsparse.method import Reparam
from fxsparse.trace.modules import FUNCTIONAL, functional_arguments, is_transposed_linear, site_type
from fxsparse.updates import ProbeSwitch


@dataclass
class WalkSite:
    """How a swapped leaf computes; shared switch, so that a probe step reaches every leaf."""

    call: Callable[..., Tensor]
    arguments: dict[str, Any]
    transposed: bool
    reparam: Reparam
    switch: ProbeSwitch

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        weight = self.reparam.effective(module.weight, module.weight_mask, self.switch.on and module.training)
        return self.call(x, weight.t() if self.transposed else weight, module.bias, **self.arguments)


def swap_leaves(skeleton: nn.Module, names: Iterable[str], reparam: Reparam, switch: ProbeSwitch) -> None:
    """Give the owners of these weights, modules of the skeleton, a forward that reads ``reparam(weight, mask)``."""
    for name in names:
        module, _ = owner(skeleton, name)
        transposed = is_transposed_linear(module)
        kind = nn.Linear if transposed else site_type(module)
        assert kind is not None, f"{name} has no site"
        arguments = {} if transposed else functional_arguments(module)
        module.__dict__["walk_site"] = WalkSite(FUNCTIONAL[kind], arguments, transposed, reparam, switch)
        module.__class__ = _swapped(type(module))


@functools.cache
def _swapped(cls: type[nn.Module]) -> type[nn.Module]:
    """One subclass per class, so that torch.compile sees one type per kind of leaf."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.walk_site(self, x)

    return type(f"Masked{cls.__name__}", (cls,), {"forward": forward})
