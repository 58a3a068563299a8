"""The nodes of the update graph: each weight by itself, or all of them together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxsparse.errors import InvariantError
from fxsparse.kernels import probe
from fxsparse.kernels.csr.conv_gradient import conv_gradient_at, conv_gradient_tiles
from fxsparse.kernels.csr.sampled import gradient_at
from fxsparse.method import JointRule, Method, Probe, Proposal, WeightView, WholeRule
from fxsparse.observed import Evidence, Observed, marginals, sum_over_ranks
from fxsparse.pattern import Pattern
from fxsparse.prices import Price
from fxsparse.rng import generator_for
from fxsparse.selection import MaskChange
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

    def nnz_at(self, step: int, method: Method) -> int:
        """Entries after the update of this step; -1 asks for the initial mask."""
        return self.pattern.feasible(self.shape, method.nnz(step, self.nnz, torch.Size(self.shape).numel()))


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

    @property
    def drop_fraction(self) -> float:
        """Share of the active entries that are to go."""
        assert self.method.schedule is not None, "a rule without a schedule never runs"
        return self.method.schedule.drop_fraction(self.number)


def update_mask(step: UpdateStep, weight: Any, mask: Tensor | None, name: str) -> bool:
    """Choose the new entries of one weight, and move mask, weight and optimizer state in place; whether any moved.

    `weight` is a Parameter with its `mask`, or a CompactWeight and None.
    """
    rule, store = step.method.rule, _store(step, weight, mask, name)
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
    chosen = rule(view)
    _check_count(len(chosen), view, step.method)
    return _move(step, name, store, view.active, chosen)


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
    return {proposal.name: positions for proposal, positions in zip(made, chosen, strict=True)}


def move_mask(
    step: UpdateStep, weight: Any, mask: Tensor | None, name: str, chosen: Mapping[str, Tensor]
) -> bool:
    """Carry out for one weight what was chosen, in place; whether any entry moved."""
    store = _store(step, weight, mask, name)
    return name in chosen and _move(step, name, store, store.active(), chosen[name])


def _store(step: UpdateStep, weight: Any, mask: Tensor | None, name: str) -> MaskedWeight | CompactWeight:
    return weight if mask is None else MaskedWeight(weight, mask, step.targets[name].transposed)


def _rewrite(step: UpdateStep, rule: WholeRule, store: MaskedWeight, name: str) -> bool:
    target = step.targets[name]
    mask = rule.mask(store.dense(), target.pattern, target.nnz_at(step.number, step.method))
    step.history.record_masks(name, step.number, store.logical_mask(), mask)
    return store.rewrite(mask)


def _move(
    step: UpdateStep, name: str, store: MaskedWeight | CompactWeight, active: Tensor, chosen: Tensor
) -> bool:
    change = MaskChange.between(active, chosen)
    step.history.record(name, step.number, active, change)
    if isinstance(store, CompactWeight):
        store.move(change, step.optimizer)
    else:
        store.move(change, step.optimizer, step.method.reparam.exact_zeros)
    return len(change.pruned) + len(change.grown) > 0


def _check_count(got: int, view: WeightView, method: Method) -> None:
    if got == view.nnz or (method.varying_nnz and got <= view.budget):
        return
    expected = f"at most {view.budget}" if method.varying_nnz else view.nnz
    raise InvariantError(
        f"{view.name}: {method.name}'s rule chose {got} entries at step {view.step}, expected {expected}. A rule whose "
        "count varies below the budget needs Method(varying_nnz=True); fxsparse.testing.check_method tests a rule."
    )


def _trains(store: MaskedWeight | CompactWeight) -> bool:
    """What is grown in a frozen weight could never leave 0."""
    return (store.values if isinstance(store, CompactWeight) else store.parameter).requires_grad


def _takes_part(store: MaskedWeight | CompactWeight, name: str, step: UpdateStep) -> bool:
    """A frozen weight keeps its mask, and so does one without a gradient to grow by, as it was not in the loss."""
    assert step.method.rule is not None
    if step.method.rule.probe is Probe.NONE or not _trains(store):
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
    )


def _tiles(store: MaskedWeight | CompactWeight, name: str, step: UpdateStep) -> Iterator[tuple[int, Tensor]]:
    if isinstance(store, MaskedWeight):
        yield 0, store.rows(step.evidence.gradients[name])
        return
    observed = step.evidence.observed[name]
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
        return store.at(step.evidence.gradients[name], positions)
    observed = step.evidence.observed[name]
    if len(store.shape) == 2:
        sampled = gradient_at(_pairs(observed), positions, store.matrix_shape)
    else:
        sampled = conv_gradient_at(_windows(observed), positions, store.shape)
    sum_over_ranks(sampled)
    return sampled


def _pairs(observed: Sequence[Observed]) -> list[tuple[Tensor, Tensor]]:
    return [(seen.inputs, seen.gradients) for seen in observed]


def _windows(observed: Sequence[Observed]) -> list[tuple[Tensor, Tensor, Mapping[str, Any]]]:
    return [(seen.inputs, seen.gradients, seen.arguments) for seen in observed]
