"""What an update rule returned, as a Choice that fits its weight; a named error where it does not."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxsparse.errors import InvariantError
from fxsparse.method import Choice, Method, WeightView
from fxsparse.selection import check_positions


def checked_choice(chosen: object, view: WeightView, method: Method) -> Choice:
    """What a rule gave for one weight.

    A mask and extras are judged by shape and dtype alone; of positions one bool is read from their device.

    Raises:
        InvariantError: neither positions, a mask nor a Choice, or one that does not fit the weight or its extras.
    """
    where = f"{view.name}: {method.name} at step {view.step}"
    choice = as_choice(chosen, where)
    entries = choice.entries
    if entries.dtype == torch.bool:
        check_mask(entries, view.shape, where)
    if entries.device != view.active.device:
        raise InvariantError(
            f"{where}: expected entries on the weight's device {view.active.device}, got {entries.device}. Make them "
            "from tensors of the view, or move them there."
        )
    if entries.dtype != torch.bool:
        check_positions(entries, torch.Size(view.shape).numel(), where)
    _check_extras(choice.extras, view.extras, where)
    return choice


def checked_choices(chosen: object, views: Sequence[WeightView], method: Method) -> list[Choice]:
    """What `GlobalRule.choose_all` gave, one for each view; InvariantError as `checked_choice`, or for other counts."""
    if not isinstance(chosen, Sequence) or len(chosen) != len(views):
        got = f"{len(chosen)} of them" if isinstance(chosen, Sequence) else type(chosen).__name__
        raise InvariantError(
            f"{method.name} at step {views[0].step}: expected choose_all to return a list of {len(views)} choices, one "
            f"for each view and in their order, got {got}."
        )
    return [checked_choice(one, view, method) for one, view in zip(chosen, views, strict=True)]


def as_choice(chosen: object, where: str) -> Choice:
    """A rule's answer as a Choice; InvariantError where it is none, nor a tensor."""
    choice = Choice(chosen) if isinstance(chosen, Tensor) else chosen
    if not isinstance(choice, Choice):
        raise InvariantError(
            f"{where}: expected an update rule to return positions, a mask or a Choice, got {type(choice).__name__}."
        )
    if not isinstance(choice.entries, Tensor):
        raise InvariantError(
            f"{where}: expected Choice.entries as a tensor of positions or a mask, got {type(choice.entries).__name__}."
        )
    return choice


def check_mask(mask: Tensor, shape: Sequence[int], where: str) -> None:
    """Raise InvariantError unless this is a bool mask of the logical `shape`."""
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        raise InvariantError(
            f"{where}: expected a bool mask of the weight's logical shape {list(shape)}, got {mask.dtype} "
            f"{list(mask.shape)}. Give it view.shape, [out, in, ...], or return positions by "
            "fxsparse.selection.to_positions."
        )


def _check_extras(given: Mapping[str, Tensor], known: Mapping[str, Tensor], where: str) -> None:
    if not isinstance(given, Mapping):
        raise InvariantError(
            f"{where}: expected Choice.extras as {{name: tensor}}, got {type(given).__name__}."
        )
    for name, value in given.items():
        if name not in known:
            raise InvariantError(
                f"{where}: expected extras among {sorted(known)}, got {name!r}. Declare it as an Extra of Method.state "
                "or of ValueMap."
            )
        wanted = known[name]
        if not isinstance(value, Tensor) or value.shape != wanted.shape or value.dtype != wanted.dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvariantError(
                f"{where}: expected extra {name!r} as {wanted.dtype} {list(wanted.shape)}, as in view.extras, got "
                f"{got}. Start from view.extras[{name!r}], by new_full or .to(its dtype)."
            )
