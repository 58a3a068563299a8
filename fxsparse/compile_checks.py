"""What `compile` and its like refuse before they begin."""

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.optim import Optimizer

from fxsparse.errors import PlanError, TraceError, UnsupportedError
from fxsparse.exported_program import refuse_exported
from fxsparse.formats import narrow
from fxsparse.graph import has_sparse_layout
from fxsparse.module import SparseModule
from fxsparse.plans import Plan
from fxsparse.wrappers import refuse_wrapped

MODES = ("train", "infer")


def check_model(model: nn.Module) -> None:
    """PlanError for anything but an nn.Module, TraceError for TorchScript, UnsupportedError for sparse layouts."""
    if not isinstance(model, nn.Module):
        way_out = "; pass its module()" if isinstance(model, ExportedProgram) else ""
        raise PlanError(f"expected the model as an nn.Module, got {type(model).__name__}{way_out}.")
    refuse_wrapped(model)
    scripted = [path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        where = f"its submodule {scripted[0]!r}" if scripted[0] else "the model"
        raise TraceError(
            f"expected modules of Python code, got TorchScript: {where} was made by torch.jit.script, trace or load, "
            "whose code and tensors cannot be rewritten; pass the nn.Module that it was made from."
        )
    for name, parameter in model.named_parameters():
        if has_sparse_layout(parameter):
            _refuse_layout(name, parameter, "its to_dense(), as the zeros are found without it")
    for name, buffer in model.named_buffers():
        if has_sparse_layout(buffer) and buffer.layout is not torch.sparse_coo:
            _refuse_layout(name, buffer, "its to_sparse_coo(), or pass it as an input")


def _refuse_layout(name: str, tensor: Tensor, way_out: str) -> None:
    raise UnsupportedError(
        f"expected tensors of modules that PyTorch can copy, got {name!r} in {tensor.layout}: use {way_out}."
    )


def check_plan(plan: Plan | None, where: str) -> None:
    """PlanError for anything but a Plan or None."""
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(
            f"{where}: expected a Plan, got {type(plan).__name__}; Plan.load and Plan.from_dict make one."
        )


def check_dense(model: nn.Module, where: str) -> None:
    """PlanError for a module that is compiled already."""
    if isinstance(model, SparseModule):
        raise PlanError(f"{where}: this model is compiled already; use model.to_dense() instead of it.")


def check_optimizer(optimizer: Optimizer | None, mode: str) -> None:
    """PlanError for anything but an optimizer, and for one where nothing is trained."""
    if optimizer is None:
        return
    if mode == "infer":
        raise PlanError(
            f"compile: mode='infer' takes no optimizer, since nothing is trained; got {type(optimizer).__name__}. "
            "Leave it out, or compile with a plan."
        )
    if not isinstance(optimizer, Optimizer):
        raise PlanError(f"compile: expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")


def check_values(values: str | None, mode: str) -> None:
    """PlanError for a form of values that inference does not have."""
    if values is None:
        return
    if values not in narrow.DTYPES:
        raise PlanError(f"compile: expected values of {list(narrow.DTYPES)} or None, got {values!r}.")
    if mode == "train":
        raise PlanError(
            f"compile: values={values!r} says how inference stores weights; training keeps the dtype of the model."
        )


def check_device(model: nn.Module, device: torch.device | str | None, optimizer: Optimizer | None) -> None:
    """PlanError for a device that means nothing for this model, or no device."""
    meta = on_meta(model)
    try:
        place = torch.device(device or "cpu")
    except (RuntimeError, TypeError) as error:
        raise PlanError(f"compile: expected a device such as 'cpu', got {device!r}: {error}") from error
    if device is not None and not meta:
        raise PlanError(
            f"compile: device={str(device)!r} says where parameters on meta are created, and this model has none; "
            "move the model with model.to(device) instead."
        )
    if place.type == "meta":
        raise PlanError("compile: expected a device with memory, got 'meta'; plan_report works without any.")
    if meta and optimizer is not None:
        raise PlanError(
            f"compile: {meta[0]!r} is on meta, so no optimizer can hold what will be created for it; make the "
            "optimizer from sparse.parameters() afterwards and call sparse.attach(optimizer)."
        )


def on_meta(model: nn.Module) -> list[str]:
    """Names of the parameters that have no values."""
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def check_call(model: nn.Module, plan: Plan | None, mode: str, *, planning: bool = False) -> None:
    """PlanError where model, plan and mode do not fit together."""
    check_model(model)
    if mode not in MODES:
        raise PlanError(f"compile: expected mode 'train' or 'infer', got {mode!r}.")
    check_plan(plan, "compile")
    if mode == "train":
        refuse_exported(model, "compile")
    if mode == "infer" and plan is not None:
        raise PlanError(
            "compile: mode='infer' takes no plan; make zeros with fxsparse.prune(model, plan) first."
        )
    if mode == "train" and plan is None:
        raise PlanError("compile: training needs a plan, for example fxsparse.Plan(sparsity=0.9).")
    meta = on_meta(model)
    if meta and mode == "infer":
        raise PlanError(
            f"compile: {meta[0]!r} is on the meta device and has no values to compile for inference; load them first."
        )
    if mode == "train":
        check_dense(model, "plan_report and allocate" if planning else "compile")
    if plan is not None and plan.method.one_shot is not None and not planning:
        raise PlanError(
            f"compile: {plan.method.name} prunes a trained model without training: call fxsparse.prune(model, plan, "
            "calibration=batches); to train on with its zeros, compile what that returns with static('magnitude') and "
            "the same allocation and pattern."
        )
