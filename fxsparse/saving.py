"""``save`` and ``load``: a compiled module, and its optimizer, as one safetensors file."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse import checkpoint, saved_artefact, saved_checks, saved_optimizer, saved_training
from fxsparse.compiler import rebuild
from fxsparse.dense_copies import versioned
from fxsparse.errors import CheckpointError, InvariantError, PatternError, PlanError, TraceError
from fxsparse.exported_program import opened, tree_of
from fxsparse.graph_model import GraphModel
from fxsparse.inference import compile_again
from fxsparse.input_check import as_captured
from fxsparse.inputs import drawn, from_json
from fxsparse.module import SparseModule
from fxsparse.plain_weights import with_plain_weights
from fxsparse.plans import Plan
from fxsparse.sharding import refuse_shards
from fxsparse.skeleton import without_values
from fxsparse.transformation import transform

_OPTIMIZER = "optimizer/"
KINDS = ("training", "inference")


def save(module: SparseModule, path: str | os.PathLike[str], *, optimizer: Optimizer | None = None) -> None:
    """Write a compiled module to one safetensors file, whole or not at all; call it between optimizer steps.

    Of training the file holds the state dict, buffers that a state dict leaves out, the plan, every decision, how masks
    moved, and with `optimizer` its state and options.  Of inference it holds the graph, with the names of its ops, the
    nonzeros of packed weights and the kernels that were measured.  It holds no code and no example inputs but their
    shapes.

    Raises:
        CheckpointError: the path cannot be written, the optimizer keeps what is neither tensor nor number, or an
            inference graph calls a function that is not PyTorch's or fxsparse's.
        PlanError: no compiled module, or an optimizer of other parameters.
    """
    if not isinstance(module, SparseModule):
        raise PlanError(
            f"save: expected what fxsparse.compile returned, got {type(module).__name__}; torch.save "
            "saves other modules."
        )
    plan = module.plan
    if plan is None and optimizer is not None:
        raise PlanError("save: a module compiled for inference has no optimizer; leave optimizer= out.")
    if plan is not None:
        refuse_shards(module, "save")
    tensors, header = (
        saved_artefact.describe(module) if plan is None else saved_training.describe(module, plan)
    )
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

    For inference nothing is traced and nothing measured, unless the processor, PyTorch, the kernels or the device are
    others than those that the file was made with: then kernels are chosen again, with a note in the report.

    Args:
        path: the file.
        model: the user's own model, as it was when it was compiled; on any device, best on meta.  It gives classes and
            shapes.  It is left untouched, and its values are not read.
        example_inputs: only needed where those of the compilation held more than tensors and plain values; where
            kernels are measured again, what they are measured on in the place of random numbers.
        optimizer: made from ``model.parameters()``, with as many groups as the saved one.  It is made to hold the
            loaded parameters instead, those that a transformation made among them, with the saved state and options.
            Without it make one from the result's ``parameters()`` and attach it.
        device: where the result lives.

    Raises:
        CheckpointError: a file that is missing, damaged, of a newer version or of another model; nothing was changed.
        PlanError: a device that is not there, or no model of the user's own.
    """
    place = _device(device)
    _check_own(model)
    tensors, header = checkpoint.read(path)
    with _blaming(path):
        if header["kind"] not in KINDS:
            raise CheckpointError(f"expected a file of a kind in {KINDS}, got {header['kind']!r}.")
        if header["kind"] == "inference":
            if optimizer is not None:
                raise CheckpointError("it holds a module compiled for inference, which no optimizer trains.")
            return _inferring(tensors, header, model, example_inputs, place)
        sparse = _trained(tensors, header, without_values(model), example_inputs).to(place)
        if optimizer is not None:
            saved_optimizer.restore(
                optimizer, header.get("optimizer"), _below(tensors, _OPTIMIZER), model, sparse
            )
    if optimizer is not None:
        sparse.attach(optimizer)
    return sparse


def _inferring(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    model: nn.Module,
    example_inputs: Any,
    place: torch.device,
) -> SparseModule:
    """As it was saved where that was measured here; else with kernels chosen again, on random example inputs."""
    row = header["example_inputs"]
    shape_inputs = from_json(row) if example_inputs is None and row is not None else example_inputs
    made_by, model = saved_training.made_by(header), opened(model)
    given = model if saved_artefact.has_names(header, model) or made_by else with_plain_weights(model)[0]
    traced = as_captured(shape_inputs, saved_checks.of_header(header))
    shell = _as_saved(made_by, traced, tree_of(without_values(given)))
    sparse = saved_artefact.restore(header, tensors, shell).to(place)
    changed = saved_artefact.what_differs(header, place)
    if changed is None or header["tier"] == "walk" or shape_inputs is None:
        return sparse
    inputs = drawn(shape_inputs, place) if example_inputs is None else example_inputs
    return compile_again(sparse, inputs, changed)


def _trained(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], shell: nn.Module, example_inputs: Any
) -> SparseModule:
    parts = (saved_training.STATE, saved_training.MORE, saved_training.TOPOLOGY)
    state, more, moved = (_below(tensors, prefix) for prefix in parts)
    run = saved_training.read(header, example_inputs)
    if int(state["fxsparse_step"]) != header["step"]:
        raise CheckpointError(
            f"expected the state of step {header['step']}, got {int(state['fxsparse_step'])}."
        )
    traced = as_captured(run.example_inputs, run.accepts)
    recipe = saved_training.recipe(run, _as_saved(run.made_by, traced, shell), state)
    history = {**header["topology"], "tensors": moved}
    sparse = rebuild(recipe, versioned(state, recipe.shell), run.training, history, more)
    saved_training.check_same(header, sparse)
    return sparse


@contextmanager
def _blaming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors inside the block become a CheckpointError that names the file, but for those of the user's model."""
    try:
        yield
    except TraceError:
        raise
    except (PlanError, PatternError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (*checkpoint.MALFORMED, InvariantError) as error:
        raise CheckpointError(f"{path}: its header is not one of fxsparse.save: {error!r}.") from error
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"{path}: its tensors are not those of fxsparse.save, or of another model: {error}"
        ) from error


def _as_saved(made_by: tuple[Plan, str] | None, example_inputs: Any, shell: nn.Module) -> nn.Module:
    """The user's model without values, transformed where the one that was saved was."""
    if made_by is None or isinstance(shell, GraphModel):
        return shell
    plan, tier = made_by
    return transform(shell, plan, example_inputs, tier=tier)


def _device(device: torch.device | str) -> torch.device:
    """The device, which has to have memory that this process can use."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        lines = str(error).strip().splitlines()
        raise PlanError(
            f"load: expected a device of this machine such as 'cpu', got {device!r}: {lines[0] if lines else error!r}"
        ) from error
    if place.type == "meta":
        raise PlanError("load: expected a device with memory, got 'meta'.")
    return place


def _check_own(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, SparseModule):
        raise PlanError(f"load: expected your own model, as it was compiled, got {type(model).__name__}.")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _version() -> str:
    try:
        return metadata.version("fxsparse")
    except metadata.PackageNotFoundError:
        return "a source tree"
