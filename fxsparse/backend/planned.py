"""``options={"plan": ...}``: weights of a graph under the fixed masks that a plan draws."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.weak import WeakTensorKeyDictionary

from fxsparse.backend.by_weights import ByWeights
from fxsparse.backend.held import HeldGraph, copied_with_sources, hold
from fxsparse.errors import PlanError, UnsupportedError
from fxsparse.globs import unmatched
from fxsparse.initial import initial_mask
from fxsparse.passes import planning_pipeline
from fxsparse.pattern import NM
from fxsparse.pipeline import PassContext, Program, run_passes
from fxsparse.plans import Plan
from fxsparse.report import Report

Call = Callable[..., Any]

_MASKS: dict[str, WeakTensorKeyDictionary] = {}
"""{plan as text: {Parameter: its mask}}: the graphs of a model, in training and in evaluation, share masks."""


def read_plan(value: Any) -> Plan | None:
    """A Plan, what `Plan.to_dict` wrote, a TOML file or the name of a preset; PlanError for what no backend can do."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        plan = Plan.from_dict(value)
    elif isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith(".toml")):
        plan = Plan.load(value)
    elif isinstance(value, Plan):
        plan = value
    elif isinstance(value, str):
        plan = Plan.preset(value)
    else:
        raise PlanError(
            f"backend 'fxsparse': expected options['plan'] as a Plan, a dict, a TOML file or a preset's name, got "
            f"{type(value).__name__}."
        )
    if reason := _why_not(plan):
        raise PlanError(
            f"backend 'fxsparse': expected a plan with fixed masks, got {reason}, and torch.compile the model that it "
            f"returns; for masks that are drawn once by magnitude, {_fixed(plan)}."
        )
    return plan


def _fixed(plan: Plan) -> str:
    """How to write a plan with the same zeros and fixed masks."""
    if isinstance(plan.pattern, NM):
        return f"write Plan(pattern=NM({plan.pattern.n}, {plan.pattern.m}))"
    if not isinstance(plan.sparsity, float):
        return "leave out the method and the transform"
    return f"write Plan(sparsity={plan.sparsity:g}) or 'static-{100 * plan.sparsity:.0f}'"


def _why_not(plan: Plan) -> str | None:
    name = plan.method.name
    if plan.transform is not None:
        return "a transform; use fxsparse.compile(model, plan)"
    if plan.method.one_shot is not None:
        return f"the method {name}, which needs calibration; use fxsparse.prune(model, plan, calibration=...)"
    if plan.method.rule is not None:
        return f"the method {name}, which moves masks; use fxsparse.compile(model, plan)"
    return None


@dataclass(frozen=True)
class MaskedGraph:
    """A compiled graph that takes masks after Dynamo's inputs: those of the Parameters that it is called with."""

    call: Call
    masks: "PlanMasks"

    def __call__(self, *args: Any) -> Any:
        """What Dynamo's graph returns under the plan's masks."""
        return self.call(*args, *self.masks(args))


class PlanMasks:
    """The masks of a plan for any Parameters that a graph is called with, drawn where none are known."""

    def __init__(self, held: HeldGraph, plan: Plan, report: Report) -> None:
        masks = _masks(held, plan, report)
        self.positions = [position for position, name in held.names.items() if name in masks]
        """Of the masked weights among Dynamo's inputs."""
        self.first = tuple(masks[held.names[position]] for position in self.positions)
        """Masks of the weights that the graph is compiled with, in the order of the positions."""
        self._held, self._plan, self._report = held.emptied(), plan, report
        self._known = ByWeights[tuple[Tensor, ...]](self.positions)

    def start(self, args: Sequence[Any]) -> None:
        """Keep the first masks with their weights alone."""
        self._known.put(args, self.first)
        self.first = ()

    def __call__(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """The masks of the weights of this call, in the order of the positions."""
        return self._known.get(args) or self._known.put(args, self._found(args))

    def _found(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        held = self._held.refreshed(args)
        masks = _masks(held, self._plan, self._report)
        names = [held.names[position] for position in self.positions]
        if lost := [name for name in masks if name not in names]:
            raise UnsupportedError(
                f"backend 'fxsparse': {lost[0]!r} has a mask in another graph, but not in this one, which was compiled "
                "for other Parameters; call torch.compiler.reset() before the model runs."
            )
        for name in names:
            if name not in masks:
                masks[name] = torch.ones_like(held.tensors()[name]).detach()
        return tuple(masks[name] for name in names)


def mask_weights(
    gm: GraphModule, example_inputs: Sequence[Any], plan: Plan, report: Report
) -> tuple[GraphModule, PlanMasks]:
    """`gm` with every weight that the plan selects under a mask, and those masks.

    The masks are inputs after its own, since Dynamo runs a graph for all models of a class.  A mask is drawn from the
    values that its weight has in the first graph that reads it.
    """
    masks = PlanMasks(hold(gm, example_inputs), plan, report)
    graph = copied_with_sources(gm.graph)  # Dynamo reads the inputs of its own after this
    placeholders = graph.find_nodes(op="placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        inputs = [graph.placeholder(f"_mask_of_{position}") for position in masks.positions]
    for position, mask in zip(masks.positions, inputs, strict=True):
        weight = placeholders[position]
        readers = list(weight.users)
        with graph.inserting_before(first):
            masked = graph.call_function(torch.mul, (weight, mask))
        for reader in readers:
            reader.replace_input_with(weight, masked)
    return GraphModule(gm, graph), masks


def _masks(held: HeldGraph, plan: Plan, report: Report) -> dict[str, Tensor]:
    """{weight: mask in its dtype} of the weights in the graph, drawn now where none is known."""
    known = _MASKS.setdefault(repr(plan.to_dict()), WeakTensorKeyDictionary())
    weights = {name: tensor for name, tensor in held.tensors().items() if tensor.dim() > 1}
    if any(weight not in known for weight in weights.values()):
        with torch.inference_mode(False), torch.no_grad():
            drawn = _drawn(held, plan, report)
        for name, weight in weights.items():
            known.setdefault(weight, drawn.get(name))
    found = {name: known[weight] for name, weight in weights.items() if known[weight] is not None}
    _note(report, _what_is_kept(found))
    return found


def _what_is_kept(masks: Mapping[str, Tensor]) -> str:
    return (
        f"the plan's masks keep {sum(int(mask.sum()) for mask in masks.values()):,} of "
        f"{sum(mask.numel() for mask in masks.values()):,} entries of {len(masks)} weights"
    )


def _note(report: Report, text: str) -> None:
    if text not in report.notes:
        report.notes.append(text)


def _drawn(held: HeldGraph, plan: Plan, report: Report) -> dict[str, Tensor]:
    names = list(held.tensors())
    asked = [*plan.exclude, *(override.glob for override in plan.overrides)]
    for glob in unmatched(asked, names):
        _note(report, f"the plan's glob {glob!r} names nothing in this graph, which has {', '.join(names)}")
    globs = {
        "exclude": _naming(plan.exclude, names),
        "overrides": tuple(override for override in plan.overrides if _naming([override.glob], names)),
    }
    program = Program("dynamo", held.root, {"eval": held.root})
    ctx = PassContext(dataclasses.replace(plan, **globs), "train", program, report, (*held.examples, {}))
    run_passes(planning_pipeline(ctx.plan), ctx)
    return {
        name: initial_mask(ctx, name).to(ctx.weights[name].dtype)
        for name, decision in ctx.decisions.items()
        if not decision.dense
    }


def _naming(globs: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The globs that name something here; after a graph break, others name what is in other graphs."""
    globs = tuple(globs)
    lost = unmatched(globs, names)
    return tuple(glob for glob in globs if glob not in lost)
