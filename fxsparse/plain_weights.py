"""Weights that PyTorch computes before every call, by masks or by parametrizations, as plain ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fxsparse.errors import UnsupportedError
from fxsparse.skeleton import copy_structure
from fxsparse.verify import RUN_FAILURES, frozen_state


def with_plain_weights(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model with the values of computed weights (or biases) in their places, and a note for every kind of them.

    These are masks of ``torch.nn.utils.prune`` and parametrizations, as ``prune.remove`` and
    ``remove_parametrizations`` would leave them in evaluation mode; a parametrization stays where two calls differ.
    A structural copy, which shares the other tensors; `model` keeps its hooks, originals and masks.  A model without
    such weights is returned itself.
    """
    if not (prune.is_pruned(model) or any(map(parametrize.is_parametrized, model.modules()))):
        return model, []
    copy = copy_structure(model)
    masked, computed = [], []
    for path, module in list(copy.named_modules()):
        dot = f"{path}." if path else ""
        masked += [dot + name for name in _fold_masks(module)]
        computed += [dot + name for name in _fold_parametrizations(module)]
    kinds = {"masks of torch.nn.utils.prune": masked, "parametrizations": computed}
    return copy, [_note(kind, names) for kind, names in kinds.items() if names]


def refuse_parametrizations(module: nn.Module) -> None:
    """Raise UnsupportedError where a module in this one is parametrized, which PyTorch does not pickle."""
    for path, part in module.named_modules():
        if parametrize.is_parametrized(part):
            raise UnsupportedError(
                f"pickle: expected modules without parametrizations, got {path!r}, a {type(part).__name__}, which "
                "PyTorch does not pickle. Use fxsparse.save, or torch.save its state_dict()."
            )


def _note(kind: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{kind} are folded into {shown}"


def _fold_masks(module: nn.Module) -> list[str]:
    """Make products with masks the Parameters that they were before they were pruned, in place; their names."""
    hooks = [(k, h) for k, h in module._forward_pre_hooks.items() if isinstance(h, prune.BasePruningMethod)]
    for key, hook in hooks:
        name = hook._tensor_name
        effective = hook.apply_mask(module).detach()
        original = module._parameters.pop(f"{name}_orig")
        assert original is not None, "the hook has just read it"
        del module._forward_pre_hooks[key], module._buffers[f"{name}_mask"]
        module.__dict__.pop(name, None)  # of the last call
        setattr(module, name, nn.Parameter(effective, original.requires_grad))
    return [hook._tensor_name for _, hook in hooks]


def _fold_parametrizations(module: nn.Module) -> list[str]:
    """Make what parametrizations compute Parameters or buffers again, in place; their names."""
    values = _values(module) if parametrize.is_parametrized(module) else {}
    if not values:
        return []
    lists: Any = module.parametrizations
    trained = {name: [p.requires_grad for p in lists[name].parameters(recurse=False)] for name in values}
    plain = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for key, wrapped in list(module._load_state_dict_pre_hooks.items()):
        if wrapped.hook.__module__ == parametrizations.__name__:  # reads the originals of weight_norm
            del module._load_state_dict_pre_hooks[key]
    module.__class__ = plain  # the class that PyTorch made has properties in the place of tensors
    for name, value in values.items():
        if trained[name]:
            setattr(module, name, nn.Parameter(value, any(trained[name])))
        else:
            module.register_buffer(name, value)
    return list(values)


def _values(module: nn.Module) -> Mapping[str, Tensor]:
    """{name: what its parametrization gives in evaluation mode}; none where it fails, or gives something else again."""
    names: Any = module.parametrizations
    try:
        with torch.no_grad(), frozen_state(module, training=False):
            first, again = ({name: getattr(module, name).detach() for name in names} for _ in range(2))
    except RUN_FAILURES:  # as the model itself does, which whoever runs it says
        return {}
    same = (value.is_meta or torch.equal(value, again[name]) for name, value in first.items())
    return first if all(same) else {}
