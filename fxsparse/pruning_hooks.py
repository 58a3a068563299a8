"""Weights that ``torch.nn.utils.prune`` multiplies by a mask before every call, as plain ones."""

from torch import nn
from torch.nn.utils import prune

from fxsparse.skeleton import copy_structure


def without_pruning_hooks(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """What ``prune.remove`` would leave of the model, and the names of its weights (or biases) that have masks.

    A structural copy, which shares the tensors that are not pruned; `model` keeps its hooks, ``*_orig`` and ``*_mask``.
    A model without such hooks is returned itself.
    """
    if not prune.is_pruned(model):
        return model, []
    copy, names = copy_structure(model), []
    for path, module in copy.named_modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod):
                del module._forward_pre_hooks[key]
                _fold(module, hook)
                names.append(f"{path}.{hook._tensor_name}" if path else hook._tensor_name)
    return copy, names


def note_of(names: list[str]) -> str:
    """What a report says of them."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"masks of torch.nn.utils.prune are folded into {shown}"


def _fold(module: nn.Module, hook: prune.BasePruningMethod) -> None:
    """Make the product with the mask the Parameter that it was before it was pruned, in place."""
    name = hook._tensor_name
    effective = hook.apply_mask(module).detach()
    original = module._parameters.pop(f"{name}_orig")
    assert original is not None, "the hook has just read it"
    del module._buffers[f"{name}_mask"]
    module.__dict__.pop(name, None)  # of the last call
    setattr(module, name, nn.Parameter(effective, original.requires_grad))
