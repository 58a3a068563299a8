"""What micro-batches left for a mask update, without those of a step that GradScaler skipped."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fxsparse.kernels import probe
from fxsparse.observed import ProbeSwitch


@dataclass
class FreshProbe:
    """Drops what a step left that GradScaler skipped: no hook of the optimizer ran, but ``.grad`` is a new tensor."""

    name: str
    switch: ProbeSwitch
    seen: dict[int, int] = field(default_factory=dict)
    gradient: Callable[[], Tensor | None] = lambda: None
    parameter: Callable[[], Tensor | None] = lambda: None

    def follow(self, parameter: Tensor) -> None:
        """Watch the gradients of `parameter`, which `fully_shard` puts in the place of another."""
        if parameter.requires_grad and parameter is not self.parameter():
            parameter.register_post_accumulate_grad_hook(self)
            self.parameter = weakref.ref(parameter)

    def __call__(self, trained: Tensor) -> None:
        if self.switch.exploring:
            return
        for key in self.switch.keys(self.name):
            entries = probe.PROBES.get(key, [])
            if self.gradient() is not trained.grad:
                del entries[: self.seen.get(key, 0)]
            self.seen[key] = len(entries)
        self.gradient = weakref.ref(trained.grad)

    def clear(self) -> None:
        for key in self.switch.keys(self.name):
            probe.clear(key)
        self.seen.clear()
