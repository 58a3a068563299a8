"""``save`` and ``load``: a compiled module, and its optimizer, as one safetensors file."""

import dataclasses
import os
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse import checkpoint, saved_optimizer
from fxsparse import pattern as patterns
from fxsparse.compiler import rebuild
from fxsparse.errors import CheckpointError, PlanError
from fxsparse.graph_model import GraphModel
from fxsparse.inputs import from_json, to_json
from fxsparse.module import Recipe, SparseModule
from fxsparse.pipeline import Decision
from fxsparse.plans import Plan
from fxsparse.prices import Price
from fxsparse.skeleton import copy_structure
from fxsparse.storage import CompactWeight
from fxsparse.transformation import transform

_STATE, _MORE, _OPTIMIZER, _TOPOLOGY = "state/", "more/", "optimizer/", "topology/"


def save(module: SparseModule, path: str | os.PathLike[str], *, optimizer: Optimizer | None = None) -> None:
    """Write a compiled module to one safetensors file, whole or not at all; call it between optimizer steps.

    The file holds the state dict, buffers that a state dict leaves out, the plan, every decision, how masks moved, and
    with `optimizer` its state and options.  It holds no code and no example inputs but their shapes.

    Raises:
        CheckpointError: the path cannot be written, or the optimizer keeps what is neither tensor nor number.
        PlanError: no compiled module, or an optimizer of other parameters.
    """
    if not isinstance(module, SparseModule):
        raise PlanError(
            f"save: expected what fxsparse.compile returned, got {type(module).__name__}; torch.save "
            "saves other modules."
        )
    tensors, header = _training(module)
    if optimizer is not None:
        held, header["optimizer"] = saved_optimizer.describe(optimizer, module)
        tensors |= {_OPTIMIZER + name: tensor for name, tensor in held.items()}
    versions = {"fxsparse": _version(), "torch": torch.__version__}
    checkpoint.write(path, tensors, versions | header)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Any = None,
    optimizer: Optimizer | None = None,
    device: torch.device | str = "cpu",
) -> SparseModule:
    """The module that `save` wrote, ready to go on bit for bit; it is attached to `optimizer`.

    Args:
        path: the file.
        model: the user's own model, as it was when it was compiled; on any device, best on meta.  It gives classes and
            shapes.  It is left untouched, and its values are not read.
        example_inputs: only needed where those of the compilation held more than tensors and plain values.
        optimizer: made from ``model.parameters()``, with as many groups as the saved one.  It is made to hold the
            loaded parameters instead, those that a transformation made among them, with the saved state and options.
            Without it make one from the result's ``parameters()`` and attach it.
        device: where the result lives.

    Raises:
        CheckpointError: a file that is missing, damaged, of a newer version or of another model; nothing was changed.
    """
    tensors, header = checkpoint.read(path)
    parts = (_STATE, _MORE, _OPTIMIZER, _TOPOLOGY)
    state, more, held, moved = (_below(tensors, prefix) for prefix in parts)
    try:
        recipe = _recipe(header, _as_saved(header, model, example_inputs), example_inputs)
        history = {**header["topology"], "tensors": moved}
        sparse = rebuild(recipe, state, header["training"], history, more).to(device)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its header is not one of fxsparse.save: {error!r}.") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if optimizer is not None:
        saved_optimizer.restore(optimizer, header.get("optimizer"), held, model, sparse)
        sparse.attach(optimizer)
    return sparse


def _training(module: SparseModule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    recipe = module._emitted.recipe
    state, plan = module.state_dict(), module.plan
    if plan is None:
        raise PlanError(
            "save: this module was compiled for inference; expected one that trains. Save that one and compile it "
            "again after loading, or pickle this one."
        )
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
        "example_inputs": to_json(recipe.example_inputs),
        "transformed": _origin(recipe.shell),
        "weights": {name: list(recipe.shell.get_parameter(name).shape) for name in recipe.decisions},
        "decisions": {name: _decision_row(decision) for name, decision in recipe.decisions.items()},
    }
    header["topology"] = history = module.report.topology.state_dict()
    tensors = {_STATE + name: tensor for name, tensor in state.items()}
    tensors |= {_TOPOLOGY + name: tensor for name, tensor in history.pop("tensors").items()}
    return tensors | {_MORE + name: buffer for name, buffer in more.items()}, header


def _origin(shell: nn.Module) -> dict[str, Any] | None:
    """What transforms the user's model again."""
    if not isinstance(shell, GraphModel):
        return None
    return {"plan": shell.origin.plan.to_dict(), "tier": shell.origin.tier}


def _as_saved(header: Mapping[str, Any], model: nn.Module, example_inputs: Any) -> nn.Module:
    """The user's model without values, transformed where the one that was saved was."""
    shell, made_by = _without_values(model), header.get("transformed")
    if made_by is None or isinstance(shell, GraphModel):
        return shell
    inputs = from_json(header["example_inputs"]) if example_inputs is None else example_inputs
    return transform(shell, Plan.from_dict(made_by["plan"]), inputs, tier=made_by["tier"])


def _recipe(header: Mapping[str, Any], shell: nn.Module, example_inputs: Any) -> Recipe:
    if header["kind"] != "training":
        raise CheckpointError(f"expected a training checkpoint, got one of kind {header['kind']!r}.")
    known = {name: list(parameter.shape) for name, parameter in shell.named_parameters()}
    for name, shape in header["weights"].items():
        if known.get(name) != shape:
            raise CheckpointError(
                f"expected a {header['model']} whose {name!r} has shape {shape}, got "
                f"{known.get(name, 'no parameter of that name')} in {type(shell).__name__}; pass the model "
                "that was saved."
            )
    if example_inputs is None:
        example_inputs = from_json(header["example_inputs"])
    decisions = {name: _decision(row) for name, row in header["decisions"].items()}
    return Recipe(shell, Plan.from_dict(header["plan"]), example_inputs, decisions, header["tier"], {})


def _decision_row(decision: Decision) -> dict[str, Any]:
    row = {field.name: getattr(decision, field.name) for field in dataclasses.fields(decision)}
    price = None if decision.price is None else decision.price.points
    return row | {"pattern": patterns.to_dict(decision.pattern), "price": price}


def _decision(row: Mapping[str, Any]) -> Decision:
    points = row.get("price")
    price = None if points is None else Price(tuple((nnz, cost) for nnz, cost in points))
    return Decision(**{**row, "pattern": patterns.from_dict(row["pattern"]), "price": price})


def _without_values(model: nn.Module) -> nn.Module:
    """A structural copy with every parameter and buffer on meta; what is shared stays shared."""
    if not isinstance(model, nn.Module) or isinstance(model, SparseModule):
        raise PlanError(f"load: expected your own model, as it was compiled, got {type(model).__name__}.")
    shell = copy_structure(model)
    made: dict[int, Tensor] = {}
    for module in shell.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                empty = tensor.detach().to("meta")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, tensor.requires_grad)
                setattr(module, name, made.setdefault(id(tensor), empty))
    return shell


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _version() -> str:
    try:
        return metadata.version("fxsparse")
    except metadata.PackageNotFoundError:
        return "a source tree"
