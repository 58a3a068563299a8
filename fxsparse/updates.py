"""The mask updates of a training run: when the optimizer steps, run the update graph.

An update happens around ``optimizer.step()`` and never in the forward graph, so that gradient accumulation, activation
checkpointing and evaluation do not count as steps.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim import Optimizer

from fxsparse import optimizer_state, sharding
from fxsparse.averages import CopiedEntries
from fxsparse.errors import PlanError
from fxsparse.fresh_probe import FreshProbe
from fxsparse.graph import fetch
from fxsparse.method import Method
from fxsparse.observed import Evidence, ProbeSwitch, sum_over_ranks
from fxsparse.parameter_groups import check_hints, extras_held
from fxsparse.penalties import add_penalty
from fxsparse.rank_counts import verify_counts, verify_shards
from fxsparse.schedule import Schedule
from fxsparse.step_closure import Once
from fxsparse.step_count import StepCount
from fxsparse.step_hooks import Each, check_follows, checked, is_skipped, makes_state_alone
from fxsparse.storage import CompactWeight, MaskedWeight, read_weights
from fxsparse.topology import TopologyHistory
from fxsparse.undisturbed import undisturbed
from fxsparse.update_mask import Target, UpdateStep

_NEVER = Schedule(every=1, stop=0)


@dataclass
class MaskUpdates:
    """Counts optimizer steps and runs the update graph on those where the schedule fires."""

    graph: GraphModule
    method: Method
    targets: dict[str, Target]
    seed: int
    switch: ProbeSwitch
    history: TopologyHistory
    count: StepCount = field(default_factory=StepCount)
    moved: bool = False
    """Whether the last counted step moved a mask."""
    _moving: bool = False
    _only_made_state: bool = False
    copied: CopiedEntries = field(default_factory=CopiedEntries)
    _averages: list["MaskUpdates"] = field(default_factory=list)
    _held: Evidence | None = None
    """From before the optimizer's step, for an update after it."""
    _explored: Evidence | None = None
    """What blocks of `exploring` saw since the last update."""
    penalty_norm: Tensor | None = None
    """Of what the method's penalty added to the gradients of the last step."""
    _outside: dict[str, Tensor] = field(default_factory=dict)
    """Weights from before the optimizer's step, where part of them does not learn."""
    _optimizer: Optimizer | None = None
    _state_seen: bool = False
    """Whether its state is known to follow masks."""
    _counts_seen: bool = False
    _shards_seen: bool = False
    """Whether masks are known to have the counts that this rank decided on, and in shards to be those of all ranks."""
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = self.method.schedule or _NEVER
        self.needs_probe = self.method.rule is not None and self.method.rule.probe.collects
        self._learns = getattr(self.method.reparam, "learns", "")
        self._probes = {
            name: FreshProbe(name, self.switch) for name in self.targets if self.switch.keys(name)
        }
        self._follow_gradients()
        self.resume(self.step)

    @property
    def step(self) -> int:
        """Optimizer steps that counted."""
        return self.count.read()

    def resume(self, step: int) -> None:
        """Continue as if `step` optimizer steps had been counted and nothing explored since the last update."""
        self._explored = None
        self._arm(step)

    @contextmanager
    def exploring(self) -> Iterator[None]:
        """See ``SparseModule.exploring``."""
        if not self.needs_probe:
            raise PlanError(
                f"exploring(): {self.method.name} chooses its entries without gradients, so a batch can tell it "
                "nothing; expected a method such as gse, rigl or srigl. Leave the block out."
            )
        if self.switch.exploring:
            raise PlanError(
                "exploring(): expected no block within another one. What several backwards of one block, or blocks "
                "after each other, see adds up: leave the inner one out."
            )
        # Weights take no part in forward but their values, so their buffers need no copy.
        stores = [weight for _, weight in self.weights()]
        held = [w.buffers() if isinstance(w, CompactWeight) else (w.mask,) for w in stores]
        still = {id(tensor) for tensors in held for tensor in tensors}
        with undisturbed(self.graph, still):
            self._clear_probes()
            self.switch.on = self.switch.exploring = True
            try:
                yield
                seen = self._collected()
                whole = {name: sharding.whole(gradient) for name, gradient in seen.gradients.items()}
                self._explored = checked(Evidence(whole, seen.observed)) + (self._explored or Evidence())
            finally:
                self.switch.exploring = False
                self._arm(self.step)

    def _arm(self, step: int) -> None:
        """Let the batches of the coming step collect what an update at its end needs, and no others."""
        self.count = StepCount(step)
        fetch(self.graph, "fxsparse_step").fill_(step)
        self.switch.on, self.switch.ran = self._fires() and self.needs_probe and self._explored is None, False
        self._clear_probes()

    def _clear_probes(self) -> None:
        for fresh in self._probes.values():
            fresh.clear()

    def _follow_gradients(self) -> None:
        for name, weight in self.weights():
            if name in self._probes:
                self._probes[name].follow(_trained(weight))

    def copy_onto(self, graph: GraphModule, switch: ProbeSwitch, history: TopologyHistory) -> "MaskUpdates":
        """The same updates for a copied module; no optimizer is attached to it."""
        updates = MaskUpdates(
            graph, self.method, self.targets, self.seed, switch, history, StepCount(self.step), self.moved
        )
        updates.copied.note(dict(updates.weights()))
        return updates

    def attach_average(self, average: "MaskUpdates") -> None:
        """See ``SparseModule.attach_average``."""
        self._averages = [known for known in self._averages if known is not average] + [average]

    def attach(self, optimizer: Optimizer) -> None:
        """Follow this optimizer's steps from now on, instead of any other's; a second call does nothing.

        Raises:
            PlanError: this is no optimizer, or it does not hold every sparse weight.
            UnsupportedError: its state cannot follow a mask (LBFGS).
        """
        if not isinstance(optimizer, Optimizer):
            raise PlanError(f"attach: expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        optimizer = optimizer_state.unwrapped(optimizer)
        if optimizer is self._optimizer:
            return
        self._check_holds_all(optimizer)
        check_follows(optimizer, self.method)
        self._follow_gradients()
        self.copied.forget()
        for handle in self._handles:
            handle.remove()
        self._optimizer, self._state_seen = optimizer, False
        self._counts_seen = self._shards_seen = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def count_step(self, optimizer: Optimizer) -> bool:
        """Whether the step just taken moved masks; a step from before `optimizer` was attached is counted here."""
        self._check_not_exploring()
        optimizer = optimizer_state.unwrapped(optimizer)
        if optimizer is not self._optimizer:
            self.attach(optimizer)
            evidence = self._take_evidence() if self._fires() else None
            self._held = evidence if evidence is not None and self._tells(evidence) else None
            self._reset_pruned_state(optimizer)
            self._after_step(optimizer, (), {})
        return self.moved

    def weights(self) -> Iterator[tuple[str, MaskedWeight | CompactWeight]]:
        """(name, storage) of every sparse weight, read from the module tree as it is now."""
        return read_weights(self.graph, self.transposed, self.method.extras)

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

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Where the backward is still to come, in a closure, the arguments with one that goes on with the update."""
        self._check_not_exploring()
        self._only_made_state = makes_state_alone(optimizer)
        if self._only_made_state:
            return None
        if not self._counts_seen:
            verify_counts(self.weights(), self.targets, self.method, self.step)
            self._counts_seen = True
        due = not (self.count.waiting or not self._fires() or is_skipped(optimizer))
        if self._learns:
            self._outside = {n: sharding.here(_trained(weight)).clone() for n, weight in self.weights()}
        if not due and self.method.penalty is None:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._with_gradients(optimizer, due)
            return None
        then = functools.partial(self._with_gradients, optimizer, due)
        closure = Once(closure, then, type(optimizer).__name__) if due else Each(closure, then)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure}
        return (args[0], closure, *args[2:]), kwargs

    def _with_gradients(self, optimizer: Optimizer, due: bool) -> None:
        """What a step does when gradients are there and the optimizer has not used them yet."""
        if due:
            self._before_update(optimizer)
        if (penalty := self.method.penalty) is not None:
            self.penalty_norm = add_penalty(penalty, self.weights(), self.targets, self.step, optimizer)

    def _before_update(self, optimizer: Optimizer) -> None:
        """Gradients are there and the optimizer has not used them yet."""
        self._check_holds_all(optimizer)
        if not self._shards_seen:
            verify_shards(dict(self.weights()))
            self._shards_seen = True
        evidence = self._take_evidence()
        if not self._tells(evidence):
            return
        if self._explored is not None or not self.schedule.skip_step:
            self._held = evidence
            return
        self._moving = self._run(optimizer, evidence)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _tells(self, evidence: Evidence) -> bool:
        """Whether an update can go by it; without, masks stay and no step of the optimizer may be given up."""
        if not self.needs_probe or evidence.gradients or evidence.observed:
            return True
        if any(_trained(weight).requires_grad for _, weight in self.weights()):
            warnings.warn(
                f"the mask update at step {self._update} is left out, and the optimizer takes its step: expected a "
                "forward and a backward through sparse weights since the step before, got none. Call the module and "
                "its backward between two steps (a forward from before the last one tells nothing, nor does a CUDA "
                "graph of an ordinary step: give the update a batch in exploring()), and zero_grad() after the step.",
                stacklevel=5,
            )
        return False

    def _check_not_exploring(self) -> None:
        if self.switch.exploring:
            raise PlanError(
                "optimizer.step() within exploring(): expected forwards and backwards alone, as the block changes "
                "nothing but the next mask update. Step after the block; several blocks add up."
            )

    @torch.no_grad()
    def _restore_outside(self) -> None:
        """Undo what momentum and weight decay did to entries that do not learn."""
        for name, weight in self.weights():
            if isinstance(weight, MaskedWeight) and name in self._outside:
                learns = sharding.part(weight.parameter, weight.extras[self._learns])
                values = sharding.here(weight.parameter)
                values.copy_(torch.where(learns, values, self._outside[name]))
        self._outside = {}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._outside:
            self._restore_outside()
        if self._only_made_state or self._can_wait(optimizer):
            return
        if is_skipped(optimizer):
            if self.count.waiting:
                self._arm(self.step)
            return
        moves = self.method.rule is not None and self.method.reparam.exact_zeros
        if optimizer.state and moves and not self._state_seen:
            optimizer_state.check_follows(optimizer, (_trained(weight) for _, weight in self.weights()))
            self._state_seen = True
        if self._held is not None:
            self._moving = self._run(optimizer, self._held)
        self.zero_pruned()
        self.moved, self._moving, self._held = self._moving, False, None
        self._arm(self.step + 1)

    @torch.no_grad()
    def _can_wait(self, optimizer: Optimizer) -> bool:
        """Whether it is left on the device if this step counts, as no update can come before the end of the next."""
        found_inf = getattr(optimizer, "found_inf", None)
        first = self.count.known + (not self.schedule.skip_step)
        near = any(map(self.schedule.fires, range(first, first + self.count.waiting + 2)))
        if not isinstance(found_inf, Tensor) or near:
            return False
        fetch(self.graph, "fxsparse_step").add_(self.count.wait(found_inf))
        self.zero_pruned()
        self.moved = False
        return True

    def _run(self, optimizer: Optimizer, evidence: Evidence) -> bool:
        self._explored = None
        averages = tuple(dict(average.weights()) for average in self._averages)
        now, stepped = self._update, self._held is not None
        step = UpdateStep(
            now, self.method, self.seed, self.targets, evidence, self.history, optimizer, averages, stepped
        )
        moved = any(self.graph(step))
        for average, weights in zip(self._averages, averages, strict=True):
            average.copied.note(weights)
        return moved

    @torch.no_grad()
    def _take_evidence(self) -> Evidence:
        """What the update goes by; what stays in ``.grad`` of masked weights is masked, in place: a CUDA graph or a
        bucket of DistributedDataParallel may own that tensor.
        """
        if not self.needs_probe:
            return Evidence()
        evidence = self._collected()
        dense = (
            {}
            if self._explored is not None
            else {n: sharding.whole(g.clone()) for n, g in evidence.gradients.items()}
        )
        for name, weight in self.weights():
            if isinstance(weight, MaskedWeight) and name in evidence.gradients:
                gradient = evidence.gradients[name]
                sharding.here(gradient).mul_(sharding.part(gradient, weight.mask))
        if self._explored is None:
            return Evidence(dense, evidence.observed) if self.switch.ran else Evidence()
        for gradient in self._explored.gradients.values():
            sum_over_ranks(gradient)
        return self._explored

    def _collected(self) -> Evidence:
        """What the backwards since `_arm` left behind."""
        gradients, observed = {}, {}
        for name, weight in self.weights():
            if isinstance(weight, MaskedWeight) and weight.parameter.grad is not None:
                gradients[name] = weight.parameter.grad
            if seen := self.switch.observed(name):
                observed[name] = seen
        return Evidence(gradients, observed)

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Keep pruned entries and unused slots at exactly 0, whatever the optimizer did (Muon's step is dense)."""
        if not self.method.reparam.exact_zeros:
            return
        for _, weight in self.weights():
            if isinstance(weight, MaskedWeight):
                sharding.here(weight.parameter).mul_(sharding.part(weight.parameter, weight.mask))
            elif self.method.varying_nnz:
                weight.zero_unused()

    @torch.no_grad()
    def _reset_pruned_state(self, optimizer: Optimizer) -> None:
        """A first step without hooks may have fed dense gradients into the optimizer's state."""
        if not self.method.reparam.exact_zeros or self.method.keeps_state:
            return
        for _, weight in self.weights():
            if isinstance(weight, MaskedWeight):
                for state in optimizer_state.per_element(optimizer, weight.parameter):
                    sharding.here(state).mul_(sharding.part(state, weight.mask))

    def _check_holds_all(self, optimizer: Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, weight in self.weights():
            parameter = _trained(weight)
            if isinstance(weight, MaskedWeight):
                sharding.refuse_flattened(name, parameter, weight.mask)
            if id(parameter) not in held and parameter.requires_grad:
                stored = "compact values" if isinstance(weight, CompactWeight) else "masked"
                raise PlanError(
                    f"attach: the optimizer does not hold {name!r} as it is stored now ({stored}): expected an "
                    "optimizer made from sparse.parameters(). Make it after fxsparse.compile and fully_shard, or pass "
                    "compile(..., optimizer=optimizer)."
                )
        check_hints(optimizer, extras_held(self.weights(), self.method.extras), self.method.name)


def _trained(weight: MaskedWeight | CompactWeight) -> Tensor:
    return weight.values if isinstance(weight, CompactWeight) else weight.parameter
