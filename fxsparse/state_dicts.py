"""What a SparseModule does around ``load_state_dict``, also where it is nested in another module."""

from typing import Any

import torch
from torch import Tensor

from fxsparse.errors import CheckpointError, PatternError
from fxsparse.storage import CompactWeight, MaskedWeight
from fxsparse.updates import MaskUpdates


def before_loading(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turn the user's dense keys in `state` into the stored ones, masks as they are, and check what is left.

    Raises:
        CheckpointError: masks that no run of this module's plan could have.
    """
    updates = module._emitted.updates
    if updates is None:
        return
    for name in ("fxsparse_step", "fxsparse_rng"):
        state.setdefault(prefix + name, module.get_buffer(name))
    for name, weight in module.weights():
        dense = state.get(prefix + name)
        if dense is not None and isinstance(weight, MaskedWeight):
            state.setdefault(f"{prefix}{name}_mask", weight.mask)
        elif dense is not None and tuple(dense.shape) == tuple(weight.shape):
            rows, cols = weight.indices.long()
            state[f"{prefix}{name}.values"] = state.pop(prefix + name).to(weight.values.device)[rows, cols]
            state.setdefault(f"{prefix}{name}.indices", weight.indices)
        _check(updates, name, weight, state, prefix)


def after_loading(module: Any, incompatible: Any) -> None:
    """Rebuild what is derived, cut dense weights by their masks, and continue at the saved step."""
    for _, weight in module.weights():
        if isinstance(weight, CompactWeight):
            weight.place(weight.active())
    updates = module._emitted.updates
    if updates is not None:
        updates.zero_pruned()
        updates.seed = int(module.get_buffer("fxsparse_rng"))
        updates.resume(int(module.get_buffer("fxsparse_step")))


def _check(
    updates: MaskUpdates, name: str, weight: CompactWeight | MaskedWeight, state: dict[str, Any], prefix: str
) -> None:
    step = int(state[f"{prefix}fxsparse_step"])
    if step < 0:
        raise CheckpointError(f"fxsparse_step: expected a count of optimizer steps, got {step}.")
    if isinstance(weight, CompactWeight):
        indices = state.get(f"{prefix}{name}.indices")
        if indices is not None and indices.dtype != torch.int32:
            raise CheckpointError(f"{name}.indices: expected int32, got {indices.dtype}.")
        return
    mask = state.get(f"{prefix}{name}_mask")
    if mask is not None and mask.shape == weight.mask.shape and weight.parameter.requires_grad:
        _check_mask(updates, name, weight, mask, step)


def _check_mask(updates: MaskUpdates, name: str, weight: MaskedWeight, mask: Tensor, step: int) -> None:
    target = updates.targets[name]
    expected, got = target.nnz_at(step, updates.method), int(mask.count_nonzero())
    varies = updates.method.varying_nnz and got <= target.budget
    advice = "Is it of another plan? Its dense weights load: save dense_state_dict() there."
    if mask.dtype != torch.bool:
        raise CheckpointError(f"{name}_mask: expected bool, got {mask.dtype}.")
    if got != expected and not varies:
        raise CheckpointError(
            f"{name}_mask: expected {expected} active entries, as this plan has after {step} steps, got {got}. {advice}"
        )
    try:
        target.pattern.check(mask.t() if target.transposed else mask)
    except PatternError as error:
        raise CheckpointError(f"{name}_mask does not fit {target.pattern}: {error} {advice}") from error
