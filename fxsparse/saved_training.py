"""A training module as named tensors and JSON values, and what compiles it again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse import pattern as patterns
from fxsparse import saved_checks
from fxsparse.errors import CheckpointError
from fxsparse.graph_model import GraphModel
from fxsparse.input_check import InputCheck
from fxsparse.inputs import from_json, to_json
from fxsparse.module import Recipe, SparseModule
from fxsparse.pipeline import Decision
from fxsparse.plans import Plan
from fxsparse.prices import Price
from fxsparse.storage import CompactWeight

STATE, MORE, TOPOLOGY = "state/", "more/", "topology/"
_STORAGES = ("masked", "compact")


def describe(module: SparseModule, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header): all that `recipe` and the module's state need."""
    recipe, state = module._emitted.recipe, module.state_dict()
    derived = [f"{name}." for name, weight in module.weights() if isinstance(weight, CompactWeight)]
    more = {
        name: buffer
        for name, buffer in module.named_buffers()
        if name not in state and not name.startswith(tuple(derived))
    }
    header = {
        "kind": "training",
        "model": type(recipe.shell).__qualname__,
        "plan": plan.to_dict(),
        "method": plan.method.name,
        "step": int(state["fxsparse_step"]),
        "training": module.training,
        "tier": recipe.tier,
        "computes": module._emitted.program.computes,
        "example_inputs": to_json(recipe.example_inputs),
        "accepts": {mode: saved_checks.to_json(check) for mode, check in recipe.accepts.items()},
        "transformed": origin_of(recipe.shell),
        "weights": {name: list(recipe.shell.get_parameter(name).shape) for name in recipe.decisions},
        "decisions": {name: _decision_row(decision) for name, decision in recipe.decisions.items()},
    }
    header["topology"] = history = module.report.topology.state_dict()
    tensors = {STATE + name: tensor for name, tensor in state.items()}
    tensors |= {TOPOLOGY + name: tensor for name, tensor in history.pop("tensors").items()}
    return tensors | {MORE + name: buffer for name, buffer in more.items()}, header


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """What a header says of a training module, checked."""

    plan: Plan
    decisions: dict[str, Decision]
    tier: str
    training: bool
    accepts: dict[str, InputCheck]
    shapes: dict[str, list[int]]
    """Of the sparse weights, dense."""
    model: str
    """The class that was compiled."""
    made_by: tuple[Plan, str] | None
    """The plan and the front end of a transformation."""
    example_inputs: Any


def read(header: Mapping[str, Any], example_inputs: Any) -> SavedRun:
    """The checked values of a header; one of ``checkpoint.MALFORMED`` where they are others than `describe` wrote."""
    if header["tier"] not in ("symbolic", "export", "walk"):
        raise ValueError(f"there is no front end {header['tier']!r}")
    decisions = {name: _decision(row) for name, row in header["decisions"].items()}
    if decisions.keys() != header["weights"].keys():
        raise ValueError("its decisions are not about its weights")
    return SavedRun(
        Plan.from_dict(header["plan"]),
        decisions,
        header["tier"],
        bool(header["training"]),
        saved_checks.of_header(header),
        {name: list(map(int, shape)) for name, shape in header["weights"].items()},
        str(header["model"]),
        made_by(header),
        from_json(header["example_inputs"]) if example_inputs is None else example_inputs,
    )


def made_by(header: Mapping[str, Any]) -> tuple[Plan, str] | None:
    """The plan and the front end of the transformation that a header tells of."""
    row = header.get("transformed")
    return None if row is None else (Plan.from_dict(row["plan"]), str(row["tier"]))


def recipe(run: SavedRun, shell: nn.Module, state: Mapping[str, Tensor]) -> Recipe:
    """What compiles the module again.

    Raises:
        CheckpointError: another model.
    """
    known = dict(shell.named_parameters())
    for name, shape in run.shapes.items():
        parameter = known.get(name)
        if parameter is None or list(parameter.shape) != shape:
            got = "no parameter of that name" if parameter is None else list(parameter.shape)
            raise CheckpointError(
                f"expected a {run.model} whose {name!r} has shape {shape}, got {got} in {type(shell).__name__}; pass "
                "the model that was saved."
            )
        values = state.get(f"{name}.values")
        if values is not None and values.dtype != parameter.dtype:
            raise CheckpointError(
                f"{name!r}: expected {parameter.dtype} {shape} as in the model, got {values.dtype} [{len(values)}]. "
                f"Convert the model first: model.to({values.dtype})."
            )
    return Recipe(shell, run.plan, run.example_inputs, run.decisions, run.tier, run.accepts)


def check_same(header: Mapping[str, Any], sparse: SparseModule) -> None:
    """What was captured now computes what was captured then; another PyTorch may write the same otherwise.

    Raises:
        CheckpointError: another model, whose weights have the same shapes.
    """
    here = sparse._emitted.program.computes
    if header["torch"] == torch.__version__ and header.get("computes", here) != here:
        raise CheckpointError(
            f"expected the {header['model']} that was saved, got a model with the same shapes whose forward computes "
            "something else (other layers, options or code); pass the model as it was compiled, with the same "
            "example_inputs if you give any."
        )


def origin_of(shell: nn.Module) -> dict[str, Any] | None:
    """What transforms the user's model again, as JSON values; None where nothing did."""
    if not isinstance(shell, GraphModel):
        return None
    return {"plan": shell.origin.plan.to_dict(), "tier": shell.origin.tier}


def _decision_row(decision: Decision) -> dict[str, Any]:
    row = {field.name: getattr(decision, field.name) for field in dataclasses.fields(decision)}
    price = None if decision.price is None else decision.price.points
    return row | {"pattern": patterns.to_dict(decision.pattern), "price": price}


def _decision(row: Mapping[str, Any]) -> Decision:
    points = row.get("price")
    price = None if points is None else Price(tuple((nnz, cost) for nnz, cost in points))
    read = {
        "pattern": patterns.from_dict(row["pattern"]),
        "price": price,
        "feeds": tuple(row.get("feeds", ())),
        "channels": tuple(row.get("channels", ())),
    }
    decision = Decision(**{**row, **read})
    counts = (decision.nnz, decision.budget, 0 if decision.initial is None else decision.initial)
    if any(type(count) is not int or count < 0 for count in counts) or decision.storage not in _STORAGES:
        raise ValueError(f"a decision has nnz, budget and storage {counts, decision.storage}")
    return decision
