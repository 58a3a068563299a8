"""Emission on the module-walk tier: the user's own forward runs, each sparse leaf multiplies by its masked weight."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.graph import owner
from fxsparse.kernels import probe
from fxsparse.method import Method, Probe, Reparam, extras_of
from fxsparse.observed import ProbeSwitch, Watched
from fxsparse.trace.modules import FUNCTIONAL, functional_arguments, is_transposed_linear, site_type


@dataclass
class WalkSite:
    """How a swapped leaf computes; shared switch, so that a probe step reaches every leaf."""

    call: Callable[..., Tensor]
    arguments: dict[str, Any]
    transposed: bool
    reparam: Reparam
    switch: ProbeSwitch
    watched: Watched | None
    """Where a probe step's backward leaves what it sees; None where the rule reads the gradient only."""

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        armed = self.switch.on and torch.is_grad_enabled()
        extras = [getattr(module, f"weight_{extra.name}") for extra in extras_of(self.reparam)]
        weight = self.reparam.effective(module.weight, module.weight_mask, armed, *extras)
        y = self.call(x, weight.t() if self.transposed else weight, module.bias, **self.arguments)
        return probe.watch(y, x, self.watched.key) if armed and self.watched is not None else y


def swap_leaves(skeleton: nn.Module, names: Iterable[str], method: Method, switch: ProbeSwitch) -> None:
    """Give the owners of these weights, modules of the skeleton, a forward that reads ``reparam(weight, mask)``."""
    guided = method.rule is not None and method.rule.probe is Probe.GUIDED
    for name in names:
        module, _ = owner(skeleton, name)
        transposed = is_transposed_linear(module)
        kind = nn.Linear if transposed else site_type(module)
        assert kind is not None, f"{name} has no site"
        arguments = {} if transposed else functional_arguments(module)
        call = FUNCTIONAL[kind]
        watched = switch.watch(name, call, arguments) if guided else None
        module.__dict__["walk_site"] = WalkSite(call, arguments, transposed, method.reparam, switch, watched)
        module.__class__ = _swapped(type(module))


@functools.cache
def _swapped(cls: type[nn.Module]) -> type[nn.Module]:
    """One subclass per class, so that torch.compile sees one type per kind of leaf."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.walk_site(self, x)

    return type(f"Masked{cls.__name__}", (cls,), {"forward": forward})
