"""What a SparseModule does around ``state_dict`` and ``load_state_dict``, also where it is nested in another module."""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxsparse import sharding
from fxsparse.errors import CheckpointError, PatternError
from fxsparse.formats import block_index, csr
from fxsparse.graph import canonical_names, owner
from fxsparse.skeleton import without_values
from fxsparse.storage import CompactWeight, MaskedWeight
from fxsparse.updates import MaskUpdates

_ADVICE = "Is it of another plan? Its dense weights load: save dense_state_dict() there."


def before_reading(module: Any, *_: Any) -> None:
    """Refuse a copy whose values stand for other entries than its indices say: whoever reads it would not notice.

    Raises:
        CheckpointError: masks have moved, and nobody told this average.
    """
    updates = module._emitted.updates
    if updates is not None and updates.copied.prints:
        updates.copied.check(dict(module.weights()))


def before_loading(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Turn the user's dense keys in `state` into the stored ones, masks as they are, and check what is left.

    Raises:
        CheckpointError: masks that no run of this module's plan could have.
    """
    updates = module._emitted.updates
    if updates is None:
        return
    own = dict(module.named_buffers(recurse=False))
    for name in ("fxsparse_step", "fxsparse_rng", "fxsparse_budgets"):
        if name in own:
            state.setdefault(prefix + name, own[name])
    sharding.reshard(module)
    for name, first, weight in _under_names_of_modules(module):
        dense = state.get(prefix + name)
        if dense is not None and isinstance(weight, MaskedWeight):
            state.setdefault(f"{prefix}{name}_mask", weight.mask)
            if weight.soft is not None:
                state.setdefault(f"{prefix}{name}_soft", weight.soft)
            for extra, tensor in weight.extras.items():
                state.setdefault(f"{prefix}{name}_{extra}", tensor.detach())
        elif isinstance(weight, CompactWeight) and dense is not None and dense.shape == weight.shape:
            dense = state.pop(prefix + name).to(weight.values.device)
            state[f"{prefix}{name}.values"] = csr.values_of(dense, weight.index)
            state.setdefault(f"{prefix}{name}.indices", weight.indices)
        if name == first:
            _check(updates, name, weight, state, prefix)
    _shard(module, state, prefix)


def rehearse(module: Any, state_dict: Mapping[str, Any], strict: bool) -> None:
    """Load into a copy without values, which raises what loading would, before anything is written.

    Sharded modules are left out: their parts are not a state dict's.
    """
    if any(sharding.is_sharded(parameter) for parameter in module.parameters()):
        return
    state: Any = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        state._metadata = state_dict._metadata  # type: ignore[attr-defined]
    before_loading(module, state, "")
    empty = without_values(module._emitted.program.skeleton)
    hooks = module._load_state_dict_pre_hooks.items()
    empty._load_state_dict_pre_hooks = OrderedDict(
        (key, hook) for key, hook in hooks if hook.hook is not before_loading
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that values go nowhere
        empty.load_state_dict(state, strict)


def after_loading(module: Any, incompatible: Any) -> None:
    """Rebuild what is derived, cut dense weights by their masks, and continue at the saved step."""
    for _, weight in module.weights():
        if isinstance(weight, CompactWeight):
            weight.reindex()
    updates = module._emitted.updates
    if updates is not None:
        updates.zero_pruned()
        updates.copied.forget()
        updates.seed = int(module.get_buffer("fxsparse_rng"))
        updates.resume(int(module.get_buffer("fxsparse_step")))
        updates.history.restart(updates.step)


def _under_names_of_modules(module: Any) -> Iterator[tuple[str, str, CompactWeight | MaskedWeight]]:
    """(name, first name, weight) as a state dict has them: for every name of a module that has several."""
    shell = module._emitted.recipe.shell
    weights = dict(module.weights())
    for name, first in canonical_names(shell).items():
        if first in weights and owner(shell, name)[0] is owner(shell, first)[0]:
            yield name, first, weights[first]


def _shard(module: Any, state: dict[str, Any], prefix: str) -> None:
    """Cut tensors in one piece where the module holds shards, as a checkpoint of one process is loaded by many."""
    for name, parameter in module.named_parameters():
        given = state.get(prefix + name)
        if not sharding.is_sharded(parameter) or not isinstance(given, Tensor) or sharding.is_sharded(given):
            continue
        if given.shape == parameter.shape:
            state[prefix + name] = sharding.shard_like(parameter, given)


def _check(
    updates: MaskUpdates, name: str, weight: CompactWeight | MaskedWeight, state: dict[str, Any], prefix: str
) -> None:
    step = int(state[f"{prefix}fxsparse_step"])
    if step < 0:
        raise CheckpointError(f"fxsparse_step: expected a count of optimizer steps, got {step}.")
    if isinstance(weight, CompactWeight):
        indices = state.get(f"{prefix}{name}.indices")
        if indices is not None and indices.shape == weight.indices.shape:
            _check_indices(updates, name, weight, indices, step)
        return
    mask = state.get(f"{prefix}{name}_mask")
    if mask is not None and mask.shape == weight.mask.shape and weight.parameter.requires_grad:
        _check_mask(updates, name, weight, mask, step)


def _check_indices(
    updates: MaskUpdates, name: str, weight: CompactWeight, indices: Tensor, step: int
) -> None:
    if indices.dtype != torch.int32:
        raise CheckpointError(f"{name}.indices: expected int32, got {indices.dtype}.")
    try:
        positions = csr.positions_in(indices, weight.matrix_shape)
        if weight.side is not None:
            block_index.of_flat(positions, weight.matrix_shape, weight.index.capacity, weight.side)
    except PatternError as error:
        raise CheckpointError(f"{name}.indices are broken: {error}. {_ADVICE}") from error
    if weight.values.requires_grad:
        _check_count(updates, name, f"{name}.indices", len(positions), step)


def _check_mask(updates: MaskUpdates, name: str, weight: MaskedWeight, mask: Tensor, step: int) -> None:
    target = updates.targets[name]
    if mask.dtype != torch.bool:
        raise CheckpointError(f"{name}_mask: expected bool, got {mask.dtype}.")
    _check_count(updates, name, f"{name}_mask", int(mask.count_nonzero()), step)
    try:
        target.pattern.check(mask.t() if target.transposed else mask)
    except PatternError as error:
        raise CheckpointError(f"{name}_mask does not fit {target.pattern}: {error} {_ADVICE}") from error


def _check_count(updates: MaskUpdates, name: str, where: str, got: int, step: int) -> None:
    target = updates.targets[name]
    if target.allows(got, step, updates.method):
        return
    expected = target.nnz_at(step, updates.method)
    raise CheckpointError(
        f"{where}: expected {expected} active entries, as this plan has after {step} steps, got {got}. {_ADVICE}"
    )
