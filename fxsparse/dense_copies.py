"""What dense copies of sparse weights are made with, and how large they may be."""

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxsparse.errors import PlanError
from fxsparse.graph import canonical_names, owner
from fxsparse.selection import to_mask
from fxsparse.storage import CompactWeight, MaskedWeight


def fill(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Give parameters and buffers these values; tied ones stay tied, and objects the same but for those on meta."""
    named = list(model.named_parameters(remove_duplicate=False))
    made = {
        id(p): nn.Parameter(values[n].clone(), p.requires_grad) for n, p in named if p.is_meta and n in values
    }
    for name, parameter in named:
        module, leaf = owner(model, name)
        if id(parameter) in made:
            module._parameters[leaf] = made[id(parameter)]
        elif name in values:
            parameter.data = values[name].clone()
    known = dict(named)
    others = {name: value for name, value in values.items() if name not in known}
    model.load_state_dict(versioned(others, model), strict=False)


def versioned(values: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """`values` with the versions of the model's modules, as its own state dict has them: some ask when loading."""
    state: Any = OrderedDict(values)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    return state


def copied_model(model: nn.Module, call: str) -> nn.Module:
    """A deep copy; PlanError that names the tensor where a module holds one that was computed for good."""
    recomputed = _before_calls(model)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in recomputed:
                raise PlanError(
                    f"{call}: expected a model that can be copied, got {f'{path}.{name}'.lstrip('.')!r}, a tensor "
                    "computed from parameters. Detach it, or compute it in the forward."
                )
    return deep_copied(model, {})


def deep_copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy``, also of a model with tensors that hooks of ``torch.nn.utils`` compute before every call."""
    memo |= _before_calls(model)
    return copy.deepcopy(model, memo)


def _before_calls(model: nn.Module) -> dict[int, Any]:
    """{id: copy} of these tensors; a copy of the model computes its own."""
    names = [
        (module, hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm)
    ]
    values = [vars(module).get(name) for module, name in names]
    return {id(value): value.detach().clone() for value in values if isinstance(value, Tensor)}


def under_every_name(
    weights: Mapping[str, CompactWeight | MaskedWeight], model: nn.Module
) -> dict[str, CompactWeight | MaskedWeight]:
    """The same storage under the other names, too, that `model` has for a weight: the user's keys have all of them."""
    names = canonical_names(model).items()
    return {**weights, **{name: weights[first] for name, first in names if first in weights}}


def numel_of(weight: CompactWeight | MaskedWeight) -> int:
    """Entries of the dense weight."""
    return torch.Size(weight.shape).numel()


def mask_of(weight: CompactWeight | MaskedWeight) -> Tensor:
    """Its mask in the dense shape, a copy."""
    if isinstance(weight, MaskedWeight):
        return weight.mask.clone()
    return to_mask(weight.active(), weight.shape)


def check_bytes(needed: int, max_bytes: int, call: str) -> None:
    """PlanError where so many bytes are more than the caller allows."""
    if needed > max_bytes:
        raise PlanError(
            f"{call}() would make {needed:,} bytes of dense tensors, more than max_bytes={max_bytes:,}: "
            "pass names= of some weights, or a larger max_bytes=."
        )


def chosen(names: Iterable[str] | None, known: Collection[str], kind: str) -> tuple[str, ...]:
    """The names that were asked for, one alone or several; all that are known for None.

    PlanError for one that is not known.
    """
    found = tuple(known if names is None else [names] if isinstance(names, str) else names)
    for name in found:
        if name not in known:
            some = ", ".join([*known][:10]) + (", ..." if len(known) > 10 else "")
            raise PlanError(f"no {kind} {name!r}: expected some of {some or 'none'}.")
    return found
