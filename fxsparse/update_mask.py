"""The node of the update graph, and the variant of the training graph that collects what it needs."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Graph
from torch.optim import Optimizer

from fxsparse import kernel
from fxsparse.errors import InvariantError
from fxsparse.graph import fetch
from fxsparse.kernels.csr import probe
from fxsparse.method import Method, Probe, Reparam, WeightView, WholeRule
from fxsparse.pattern import Pattern
from fxsparse.rng import generator_for
from fxsparse.selection import MaskChange
from fxsparse.storage import CompactWeight, MaskedWeight


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
    gradients: Mapping[str, Tensor]
    """Dense gradients of masked weights, where the rule needs them."""
    optimizer: Optimizer | None = None


def update_mask(step: UpdateStep, weight: Any, mask: Tensor | None, name: str) -> bool:
    """Choose the new entries of one weight, and move mask, weight and optimizer state in place; whether any moved.

    `weight` is a Parameter with its `mask`, or a CompactWeight and None.
    """
    target, rule = step.targets[name], step.method.rule
    assert rule is not None, "an update graph has nodes only where a rule moves masks"
    trained = weight.values if mask is None else weight
    if not trained.requires_grad:
        return False  # what is grown in a frozen weight could never leave 0
    store = weight if mask is None else MaskedWeight(weight, mask, target.transposed)
    if isinstance(rule, WholeRule) and not step.method.reparam.exact_zeros:
        return store.rewrite(
            rule.mask(store.dense(), target.pattern, target.nnz_at(step.number, step.method))
        )
    active = store.active()
    if rule.probe is Probe.DENSE and not _was_probed(store, name, step):
        return False
    view = _view(store, active, target, name, step)
    chosen = rule(view)
    _check_count(len(chosen), view, step.method)
    change = MaskChange.between(active, chosen)
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


def _was_probed(store: MaskedWeight | CompactWeight, name: str, step: UpdateStep) -> bool:
    """A weight that took no part in the loss has no gradient to grow by, and keeps its mask."""
    if isinstance(store, CompactWeight):
        return bool(probe.PROBES.get(store.probe_key))
    return name in step.gradients


def _view(
    store: MaskedWeight | CompactWeight, active: Tensor, target: Target, name: str, step: UpdateStep
) -> WeightView:
    schedule = step.method.schedule
    assert schedule is not None, "a rule without a schedule never runs"
    return WeightView(
        name=name,
        shape=store.shape,
        pattern=target.pattern,
        nnz=target.nnz_at(step.number, step.method),
        budget=target.budget,
        step=step.number,
        drop_fraction=schedule.drop_fraction(step.number),
        active=active,
        values=store.values_at(active),
        weight=store.dense,
        gradient_tiles=lambda: _tiles(store, name, step),
        generator=generator_for(step.seed, name, step.number),
        ablates=target.ablates,
    )


def _tiles(store: MaskedWeight | CompactWeight, name: str, step: UpdateStep) -> Iterator[tuple[int, Tensor]]:
    if isinstance(store, MaskedWeight):
        yield 0, store.rows(step.gradients[name])
        return
    for row, tile in probe.gradient_tiles(store.probe_key, store.shape):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(tile)
        yield row, tile


def probe_variant(graph: Graph, skeleton: nn.Module, reparam: Reparam) -> Graph:
    """A copy whose backward also yields dense gradients: in ``.grad`` of masked weights, in the probe of compact."""
    graph = copy.deepcopy(graph)
    plain, dense_grad = reparam.function(False)[0], reparam.function(True)[0]
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is plain:
            node.target = dense_grad
        elif node.target is kernel.registered()[kernel.TRAINING].run:
            compact = fetch(skeleton, str(node.args[2].target).removesuffix(".values"))
            node.kwargs = {**node.kwargs, "probe_key": compact.probe_key}
    return graph
