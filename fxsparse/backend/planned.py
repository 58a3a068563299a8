"""``options={"plan": ...}``: weights of a graph under the fixed masks that a plan draws."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.weak import WeakTensorKeyDictionary

from fxsparse.backend.held import HeldGraph, hold
from fxsparse.errors import PlanError
from fxsparse.globs import matches
from fxsparse.initial import initial_mask
from fxsparse.passes import planning_pipeline
from fxsparse.pipeline import PassContext, Program, run_passes
from fxsparse.plans import Plan
from fxsparse.report import Report

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
            f"backend 'fxsparse': expected a plan with fixed masks, such as static('magnitude') draws, got {reason}, "
            "and torch.compile the model that it returns."
        )
    return plan


def _why_not(plan: Plan) -> str | None:
    name = plan.method.name
    if plan.transform is not None:
        return "a transform; use fxsparse.compile(model, plan)"
    if plan.method.one_shot is not None:
        return f"the method {name}, which needs calibration; use fxsparse.prune(model, plan, calibration=...)"
    if plan.method.rule is not None:
        return f"the method {name}, which moves masks; use fxsparse.compile(model, plan)"
    return None


def mask_weights(gm: GraphModule, example_inputs: Sequence[Any], plan: Plan, report: Report) -> GraphModule:
    """Multiply every weight that the plan selects by its mask, in the graph of `gm`; other Parameters stay as they are.

    A mask is drawn from the values that its weight has in the first graph that reads it.
    """
    held = hold(gm, example_inputs)
    masks = _masks(held, plan, report)
    graph = gm.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    placeholders = graph.find_nodes(op="placeholder")
    for position, name in held.names.items():
        if name not in masks:
            continue
        buffer, weight = f"_mask_of_{position}", placeholders[position]
        gm.register_buffer(buffer, masks[name], persistent=False)
        readers = list(weight.users)
        with graph.inserting_before(first):
            masked = graph.call_function(torch.mul, (weight, graph.get_attr(buffer)))
        for reader in readers:
            reader.replace_input_with(weight, masked)
    return GraphModule(gm, graph)  # a new one: AOTAutograd asks Dynamo's where each of its buffers comes from


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
    report.notes.append(
        f"the plan's masks keep {sum(int(mask.sum()) for mask in found.values()):,} of "
        f"{sum(mask.numel() for mask in found.values()):,} entries of {len(found)} weights"
    )
    return found


def _drawn(held: HeldGraph, plan: Plan, report: Report) -> dict[str, Tensor]:
    names = list(held.tensors())
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
    names = list(names)
    return tuple(glob for glob in globs if any(matches(glob, name) for name in names))
