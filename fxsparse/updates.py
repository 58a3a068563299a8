"""The mask updates of a training run: when the optimizer steps, run the update graph.

An update happens around ``optimizer.step()`` and never in the forward graph, so that gradient accumulation, activation
checkpointing and evaluation do not count as steps.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim import Optimizer

from fxsparse import optimizer_state
from fxsparse.errors import PlanError
from fxsparse.graph import fetch
from fxsparse.kernels.csr import probe
from fxsparse.method import Method, Probe
from fxsparse.schedule import Schedule
from fxsparse.storage import CompactWeight, MaskedWeight, read_weights
from fxsparse.update_mask import Target, UpdateStep

_NEVER = Schedule(every=1, stop=0)


@dataclass
class ProbeSwitch:
    """Whether this training step collects what the next update needs; one object shared by all that must know."""

    on: bool = False


@dataclass
class MaskUpdates:
    """Counts optimizer steps and runs the update graph on those where the schedule fires."""

    graph: GraphModule
    method: Method
    targets: dict[str, Target]
    seed: int
    switch: ProbeSwitch
    step: int = 0
    moved: bool = False
    """Whether the last counted step moved a mask."""
    _moving: bool = False
    _held: dict[str, Tensor] | None = None
    """Dense gradients from before the optimizer's step, for an update after it."""
    _optimizer: Optimizer | None = None
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = self.method.schedule or _NEVER
        self.needs_dense_gradients = self.method.rule is not None and self.method.rule.probe is Probe.DENSE
        self._probes: list[_FreshProbe] = []
        for _, weight in self.weights():
            if isinstance(weight, CompactWeight) and weight.values.requires_grad:
                self._probes.append(_FreshProbe(weight.probe_key))
                weight.values.register_post_accumulate_grad_hook(self._probes[-1])
        self.resume(self.step)

    def resume(self, step: int) -> None:
        """Continue as if `step` optimizer steps had been counted."""
        self.step = step
        fetch(self.graph, "fxsparse_step").fill_(step)
        self.switch.on = self._fires() and self.needs_dense_gradients
        for fresh in self._probes:
            fresh.clear()

    def copy_onto(self, graph: GraphModule, switch: ProbeSwitch) -> "MaskUpdates":
        """The same updates for a copied module; no optimizer is attached to it."""
        return MaskUpdates(graph, self.method, self.targets, self.seed, switch, self.step, self.moved)

    def attach(self, optimizer: Optimizer) -> None:
        """Follow this optimizer's steps from now on, instead of any other's; a second call does nothing.

        Raises:
            PlanError: this is no optimizer, or it does not hold every sparse weight.
        """
        if not isinstance(optimizer, Optimizer):
            raise PlanError(f"attach: expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if optimizer is self._optimizer:
            return
        self._check_holds_all(optimizer)
        for handle in self._handles:
            handle.remove()
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def count_step(self, optimizer: Optimizer) -> bool:
        """Whether the step just taken moved masks; a step from before `optimizer` was attached is counted here."""
        if optimizer is not self._optimizer:
            self.attach(optimizer)
            self._held = self._take_gradients() if self._fires() else None
            self._reset_pruned_state(optimizer)
            self._after_step(optimizer, (), {})
        return self.moved

    def weights(self) -> Iterator[tuple[str, MaskedWeight | CompactWeight]]:
        """(name, storage) of every sparse weight, read from the module tree as it is now."""
        return read_weights(self.graph, self.transposed)

    @property
    def transposed(self) -> dict[str, bool]:
        """{name: whether the user stores the weight [in, out]}."""
        return {name: target.transposed for name, target in self.targets.items()}

    @property
    def _update(self) -> int:
        """The step number that an update around the coming optimizer step would have: see `Schedule`."""
        return self.step if self.schedule.skip_step else self.step + 1

    def _fires(self) -> bool:
        return self.schedule.fires(self._update)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _is_skipped(optimizer) or not self._fires():
            return
        gradients = self._take_gradients()
        if not self.schedule.skip_step:
            self._held = gradients
            return
        self._moving = self._run(optimizer, gradients)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _is_skipped(optimizer):
            return
        if self._held is not None:
            self._moving = self._run(optimizer, self._held)
        self.zero_pruned()
        self.moved, self._moving, self._held = self._moving, False, None
        self.resume(self.step + 1)

    def _run(self, optimizer: Optimizer, gradients: Mapping[str, Tensor]) -> bool:
        moved = self.graph(
            UpdateStep(self._update, self.method, self.seed, self.targets, gradients, optimizer)
        )
        return any(moved)

    @torch.no_grad()
    def _take_gradients(self) -> dict[str, Tensor]:
        """The dense gradients of masked weights; what stays in ``.grad`` is masked."""
        if not self.needs_dense_gradients:
            return {}
        gradients = {}
        for name, weight in self.weights():
            if isinstance(weight, MaskedWeight) and weight.parameter.grad is not None:
                gradients[name] = weight.parameter.grad
                weight.parameter.grad = weight.parameter.grad * weight.mask
        return gradients

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Keep pruned entries and unused slots at exactly 0, whatever the optimizer did (Muon's step is dense)."""
        if not self.method.reparam.exact_zeros:
            return
        for _, weight in self.weights():
            if isinstance(weight, MaskedWeight):
                weight.parameter.mul_(weight.mask)
            elif self.method.varying_nnz:
                weight.zero_unused()

    @torch.no_grad()
    def _reset_pruned_state(self, optimizer: Optimizer) -> None:
        """A first step without hooks may have fed dense gradients into the optimizer's state."""
        for _, weight in self.weights():
            if isinstance(weight, MaskedWeight) and self.method.reparam.exact_zeros:
                for state in optimizer_state.per_element(optimizer, weight.parameter):
                    state.mul_(weight.mask)

    def _check_holds_all(self, optimizer: Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, weight in self.weights():
            parameter = weight.values if isinstance(weight, CompactWeight) else weight.parameter
            if id(parameter) not in held and parameter.requires_grad:
                stored = "compact values" if isinstance(weight, CompactWeight) else "masked"
                raise PlanError(
                    f"attach: the optimizer does not hold {name!r} as it is stored now ({stored}): expected an "
                    "optimizer made from sparse.parameters(). Make it after fxsparse.compile, or pass "
                    "compile(..., optimizer=optimizer)."
                )


@dataclass
class _FreshProbe:
    """Drops what a step left that GradScaler skipped: no hook of the optimizer ran, but ``.grad`` is a new tensor."""

    key: int
    seen: int = 0
    gradient: Callable[[], Tensor | None] = lambda: None

    def __call__(self, values: Tensor) -> None:
        entries = probe.PROBES.get(self.key, [])
        if self.gradient() is not values.grad:
            del entries[: self.seen]
        self.seen = len(entries)
        self.gradient = weakref.ref(values.grad)

    def clear(self) -> None:
        probe.clear(self.key)
        self.seen = 0


def _is_skipped(optimizer: Optimizer) -> bool:
    """GradScaler hands a fused optimizer its inf check; the hooks of such a step fire although nothing moved."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
