"""The nodes of the update graph: each weight by itself, or all of them together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxsparse import optimizer_state, sharding
from fxsparse.averages import Weights, follow
from fxsparse.choice_checks import check_mask, checked_choice, checked_choices
from fxsparse.errors import InvariantError, PlanError
from fxsparse.kernels import probe
from fxsparse.kernels.csr.conv_gradient import conv_gradient_at, conv_gradient_tiles
from fxsparse.kernels.csr.sampled import gradient_at
from fxsparse.method import Choice, GlobalRule, JointRule, Method, Proposal, WeightView, WholeRule
from fxsparse.observed import Evidence, Observed, marginals, sum_over_ranks
from fxsparse.pattern import Pattern
from fxsparse.prices import Price
from fxsparse.rng import generator_for
from fxsparse.selection import MaskChange, check_positions, to_positions
from fxsparse.storage import CompactWeight, MaskedWeight
from fxsparse.topology import TopologyHistory


@dataclass(frozen=True)
class Target:
    """What the updates of one weight need besides its tensors."""

    shape: tuple[int, ...]
    """Logical shape, [out, in] or [out, in, *kernel]."""
    pattern: Pattern
    nnz: int
    """Entries at the end of training."""
    budget: int
    """What the allocation gave the weight; a method with varying nnz has at most so many entries."""
    transposed: bool = False
    ablates: bool = False
    """Whether whole neurons may go."""
    cost: float = 1.0
    """Of an entry, in the unit of the plan's budget, where all weights share one."""
    price: Price | None = None
    """Of the whole weight by its nonzeros, where the plan has a budget and the weight may be pruned."""
    limit: float = 0.0
    """What all weights may cost together by their prices."""
    initial: int | None = None
    """Entries before the first update, where the method starts from a sparsity of its own."""
    feeds: tuple[str, ...] = ()
    """Weights whose columns are this weight's rows."""
    channels: tuple[int, ...] = ()
    """For each row its channel, where that is known."""
    dense: bool = False
    """An override keeps the weight dense, outside of what others share."""
    settled: bool = False
    """It has its final count at every step."""

    def nnz_at(self, step: int, method: Method) -> int:
        """Entries after the update of this step; -1 asks for the initial mask."""
        if self.settled:
            return self.nnz
        if self.initial is not None and (method.schedule is None or method.schedule.last_update(step) < 0):
            return self.initial
        return self.pattern.feasible(self.shape, method.nnz(step, self.nnz, torch.Size(self.shape).numel()))

    def allows(self, count: int, step: int, method: Method) -> bool:
        """Whether a mask may have so many entries after so many steps."""
        free = method.is_joint or method.learned_nnz or (method.varying_nnz and count <= self.budget)
        return free or count == self.nnz_at(step, method)


@dataclass(frozen=True)
class UpdateStep:
    """The input of the update graph."""

    number: int
    method: Method
    seed: int
    targets: Mapping[str, Target]
    evidence: Evidence
    history: TopologyHistory
    """Told of every update."""
    optimizer: Optimizer | None = None
    averages: Sequence[Weights] = ()
    """Copies whose values go where those of the weights go."""
    stepped: bool = False
    """The optimizer has taken this step, so that a fused one has divided ``.grad`` by the scale of a GradScaler."""

    @property
    def drop_fraction(self) -> float:
        """Share of the active entries that are to go."""
        assert self.method.schedule is not None, "a rule without a schedule never runs"
        return self.method.schedule.drop_fraction(self.number)


Extras = Mapping[str, Tensor]
"""{name of an `Extra`: its tensor beside the weight}."""


def update_mask(
    step: UpdateStep, weight: Any, mask: Tensor | None, name: str, extras: Extras | None = None
) -> bool:
    """Choose the new entries of one weight, and move mask, weight and optimizer state in place; whether any moved.

    `weight` is a Parameter with its `mask`, or a CompactWeight and None.
    """
    rule, store = step.method.rule, _store(step, weight, mask, name, extras)
    assert rule is not None, "an update graph has nodes only where a rule moves masks"
    if (
        isinstance(rule, WholeRule)
        and isinstance(store, MaskedWeight)
        and not step.method.reparam.exact_zeros
    ):
        return _trains(store) and _rewrite(step, rule, store, name)
    if not _takes_part(store, name, step):
        return False
    view = _view(store, name, step)
    choice = checked_choice(rule(view), view, step.method)
    _check_count(counted(choice), view, step.method)
    return _carry_out(step, name, store, view.active, choice)


def update_together(
    step: UpdateStep, weights: Sequence[tuple[Any, Tensor, str] | tuple[Any, Tensor, str, Extras]]
) -> bool:
    """Let a `GlobalRule` choose for all weights at once, and move all of them in place; whether any moved."""
    rule, method = step.method.rule, step.method
    assert isinstance(rule, GlobalRule)
    stores = [(name, _store(step, weight, mask, name, *more)) for weight, mask, name, *more in weights]
    stores = [(n, s) for n, s in stores if not step.targets[n].dense and _takes_part(s, n, step)]
    if not stores:
        return False
    views = [_view(store, name, step) for name, store in stores]
    targets = [step.targets[name] for name, _ in stores]
    numels = [torch.Size(target.shape).numel() for target in targets]
    total = method.nnz(step.number, sum(target.nnz for target in targets), sum(numels))
    choices = checked_choices(rule.choose_all(views, total), views, method)
    _check_total(sum(map(counted, choices)), total, step)
    moved = [
        _carry_out(step, name, store, view.active, choice)
        for (name, store), view, choice in zip(stores, views, choices, strict=True)
    ]
    return any(moved)


def counted(choice: Choice) -> int:
    """Entries that are to be active."""
    entries = choice.entries
    return int(entries.sum()) if entries.dtype == torch.bool else len(entries)


def propose(step: UpdateStep, weight: Any, mask: Tensor | None, name: str) -> Proposal | None:
    """What one weight brings to a choice among all weights; None if it keeps its mask."""
    rule, store = step.method.rule, _store(step, weight, mask, name)
    assert isinstance(rule, JointRule)
    return rule.propose(_view(store, name, step)) if _takes_part(store, name, step) else None


def choose_together(step: UpdateStep, proposals: Sequence[Proposal | None]) -> dict[str, Tensor]:
    """{weight name: flat positions to be active}, ranked over all proposals."""
    rule, made = step.method.rule, [proposal for proposal in proposals if proposal is not None]
    assert isinstance(rule, JointRule)
    chosen = rule.choose(made, step.drop_fraction)
    for proposal, positions in zip(made, chosen, strict=True):
        numel = torch.Size(step.targets[proposal.name].shape).numel()
        check_positions(positions, numel, f"{proposal.name}: {step.method.name} at step {step.number}")
    return {proposal.name: positions for proposal, positions in zip(made, chosen, strict=True)}


def move_mask(
    step: UpdateStep, weight: Any, mask: Tensor | None, name: str, chosen: Mapping[str, Tensor]
) -> bool:
    """Carry out for one weight what was chosen, in place; whether any entry moved."""
    store = _store(step, weight, mask, name)
    return name in chosen and _move(step, name, store, store.active(), chosen[name])


def _store(
    step: UpdateStep, weight: Any, mask: Tensor | None, name: str, extras: Extras | None = None
) -> MaskedWeight | CompactWeight:
    if mask is None:
        return weight
    return MaskedWeight(weight, mask, step.targets[name].transposed, extras=extras or {})


def _rewrite(step: UpdateStep, rule: WholeRule, store: MaskedWeight, name: str) -> bool:
    target = step.targets[name]
    mask = rule.mask(store.dense(), target.pattern, target.nnz_at(step.number, step.method))
    check_mask(mask, store.shape, f"{name}: {step.method.name} at step {step.number}")
    step.history.record_masks(name, step.number, store.logical_mask(), mask)
    return store.rewrite(mask)


def _carry_out(
    step: UpdateStep, name: str, store: MaskedWeight | CompactWeight, active: Tensor, choice: Choice
) -> bool:
    if isinstance(store, MaskedWeight):
        store.write_extras(choice.extras)
        if choice.forget and step.optimizer is not None:
            optimizer_state.reset(step.optimizer, store.parameter)
        if choice.entries.dtype == torch.bool and not step.method.reparam.exact_zeros:
            step.history.record_masks(name, step.number, store.logical_mask(), choice.entries)
            return store.rewrite(choice.entries)
    entries = choice.entries
    return _move(step, name, store, active, to_positions(entries) if entries.dtype == torch.bool else entries)


def _move(
    step: UpdateStep, name: str, store: MaskedWeight | CompactWeight, active: Tensor, chosen: Tensor
) -> bool:
    change = MaskChange.between(active, chosen)
    step.history.record(name, step.number, active, change)
    if isinstance(store, CompactWeight):
        store.move(change, step.optimizer)
        for average in step.averages:
            follow(average, name, change)
    else:
        store.move(change, step.optimizer, step.method.reparam.exact_zeros, step.method.keeps_state)
    return len(change.pruned) + len(change.grown) > 0


def _check_count(got: int, view: WeightView, method: Method) -> None:
    if got == view.nnz or (method.varying_nnz and got <= view.budget) or method.learned_nnz:
        return
    expected = f"at most {view.budget}" if method.varying_nnz else view.nnz
    raise InvariantError(
        f"{view.name}: {method.name}'s rule chose {got} entries at step {view.step}, expected {expected}. A rule whose "
        "count varies below the budget needs Method(varying_nnz=True); fxsparse.testing.check_method tests a rule."
    )


def _check_total(got: int, total: int, step: UpdateStep) -> None:
    if got != total and not step.method.learned_nnz:
        raise InvariantError(
            f"{step.method.name}'s rule chose {got} entries of all weights at step {step.number}, expected {total}. "
            "fxsparse.testing.check_method tests a rule; Method(learned_nnz=True) is one whose count training decides."
        )


def _trains(store: MaskedWeight | CompactWeight) -> bool:
    """What is grown in a frozen weight could never leave 0, unless its mask is learned."""
    if isinstance(store, CompactWeight):
        return store.values.requires_grad
    return store.parameter.requires_grad or any(extra.requires_grad for extra in store.extras.values())


def _takes_part(store: MaskedWeight | CompactWeight, name: str, step: UpdateStep) -> bool:
    """A frozen weight keeps its mask, and so does one without a gradient to grow by, as it was not in the loss."""
    assert step.method.rule is not None
    if not step.method.rule.probe.collects or not _trains(store):
        return _trains(store)
    evidence = step.evidence
    return bool(
        evidence.observed.get(name) if isinstance(store, CompactWeight) else name in evidence.gradients
    )


def _view(store: MaskedWeight | CompactWeight, name: str, step: UpdateStep) -> WeightView:
    target, active, observed = step.targets[name], store.active(), step.evidence.observed.get(name, ())
    return WeightView(
        name=name,
        shape=store.shape,
        pattern=target.pattern,
        nnz=target.nnz_at(step.number, step.method),
        budget=target.budget,
        step=step.number,
        drop_fraction=step.drop_fraction,
        active=active,
        values=store.values_at(active),
        weight=store.dense,
        gradient_tiles=lambda: _tiles(store, name, step),
        gradient_at=lambda positions: _gradient_at(store, positions, name, step),
        marginals=lambda signs: marginals(observed, store.shape, signs),
        generator=generator_for(step.seed, name, step.number),
        ablates=target.ablates,
        final=target.nnz,
        extras={} if isinstance(store, CompactWeight) else store.logical_extras(),
        active_gradient=lambda: _active_gradient(store, active, name, step),
        momentum=lambda: _momentum(store, name, step),
        feeds=target.feeds,
        channels=target.channels,
    )


def _active_gradient(
    store: MaskedWeight | CompactWeight, active: Tensor, name: str, step: UpdateStep
) -> Tensor:
    gradient = (store.values if isinstance(store, CompactWeight) else store.parameter).grad
    if gradient is None:
        raise PlanError(
            f"{step.method.name} at step {step.number} ranks {name!r} by its gradient, and it has none: expected a "
            "backward through it before the step, and zero_grad() after the update, not before it."
        )
    # Of a GradScaler: a fused optimizer divides ``.grad`` by it, in place, and others find it divided.
    scale = None if step.stepped else getattr(step.optimizer, "grad_scale", None)
    compact = isinstance(store, CompactWeight)
    found = gradient[: len(active)] if compact else store.at(sharding.whole(gradient), active)
    return found if scale is None else found / scale


def _momentum(store: MaskedWeight | CompactWeight, name: str, step: UpdateStep) -> Tensor:
    assert isinstance(store, MaskedWeight), "a method with Probe.EMA_DENSE has masked storage"
    if step.optimizer is None:
        raise PlanError(f"{step.method.name} reads the optimizer's momentum: attach an optimizer first.")
    return store.logical(optimizer_state.momentum(step.optimizer, store.parameter, name))


def _tiles(store: MaskedWeight | CompactWeight, name: str, step: UpdateStep) -> Iterator[tuple[int, Tensor]]:
    if isinstance(store, MaskedWeight):
        yield 0, store.rows(_collected(step.evidence.gradients, name, step))
        return
    observed = _collected(step.evidence.observed, name, step)
    if len(store.shape) == 2:
        tiles = probe.gradient_tiles(_pairs(observed), store.matrix_shape)
    else:
        tiles = conv_gradient_tiles(_windows(observed), store.shape)
    for row, tile in tiles:
        sum_over_ranks(tile)
        yield row, tile


def _gradient_at(
    store: MaskedWeight | CompactWeight, positions: Tensor, name: str, step: UpdateStep
) -> Tensor:
    if isinstance(store, MaskedWeight):
        return store.at(_collected(step.evidence.gradients, name, step), positions)
    observed = _collected(step.evidence.observed, name, step)
    if len(store.shape) == 2:
        sampled = gradient_at(_pairs(observed), positions, store.matrix_shape)
    else:
        sampled = conv_gradient_at(_windows(observed), positions, store.shape)
    sum_over_ranks(sampled)
    return sampled


def _collected(evidence: Mapping[str, Any], name: str, step: UpdateStep) -> Any:
    if name not in evidence:
        rule = step.method.rule
        assert rule is not None, "only a rule reads gradients"
        raise InvariantError(
            f"{name}: {step.method.name} at step {step.number} reads gradients beyond the active entries, which a rule "
            f"with Probe.{rule.probe.name} does not collect: expected probe = Probe.DENSE for gradient_tiles, SAMPLED "
            "or GUIDED for gradient_at."
        )
    return evidence[name]


def _pairs(observed: Sequence[Observed]) -> list[tuple[Tensor, Tensor]]:
    return [(seen.inputs, seen.gradients) for seen in observed]


def _windows(observed: Sequence[Observed]) -> list[tuple[Tensor, Tensor, Mapping[str, Any]]]:
    return [(seen.inputs, seen.gradients, seen.arguments) for seen in observed]
