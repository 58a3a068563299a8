"""An optimizer as named tensors and plain values, and back."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import CheckpointError, PlanError
from fxsparse.module import SparseModule
from fxsparse.storage import CompactWeight


def describe(optimizer: Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(its state tensors, the rest as JSON values): parameters by name, the state by their number in its groups.

    Raises:
        PlanError: no optimizer, or it holds something else than parameters of `module`.
        CheckpointError: it keeps what is neither a tensor nor a plain value.
    """
    if not isinstance(optimizer, Optimizer):
        raise PlanError(f"save: expected a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    held = list(_parameters(optimizer))
    if any(id(parameter) not in names for parameter in held):
        raise PlanError(
            "save: the optimizer holds parameters that are not this module's: expected one made from its parameters()."
        )
    tensors: dict[str, Tensor] = {}
    saved = optimizer.state_dict()
    return tensors, {
        "class": type(optimizer).__name__,
        "names": [names[id(parameter)] for parameter in held],
        "state": {str(key): _plain(state, f"{key}", tensors) for key, state in saved["state"].items()},
        "groups": [_plain(group, f"group{k}", tensors) for k, group in enumerate(saved["param_groups"])],
    }


def restore(
    optimizer: Optimizer,
    saved: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    sparse: SparseModule,
) -> None:
    """Let an optimizer made from ``model.parameters()`` hold those of `sparse` instead, with the saved state, in place.

    Where a transformation replaced parameters, what it made in their place goes into the groups that it was saved in.

    Raises:
        CheckpointError: nothing was saved, or for another optimizer or other groups; the optimizer is left as it was.
    """
    if saved is None:
        raise CheckpointError("load: the file holds no optimizer; it was saved without optimizer=.")
    by_name, names = dict(sparse.named_parameters()), _new_names(model, sparse)
    found = [
        [names.get(id(parameter), "of something else") for parameter in group["params"]]
        for group in optimizer.param_groups
    ]
    left, sizes = iter(saved["names"]), [len(group["params"]) for group in saved["groups"]]
    if sum(sizes) != len(saved["names"]):
        raise CheckpointError(
            f"load: the saved groups {sizes} are not of its {len(saved['names'])} parameters."
        )
    expected = [list(itertools.islice(left, size)) for size in sizes]
    kept = [sorted(name for name in group if name in names.values()) for group in expected]
    asked = [sorted(name for name in group if name is not None) for group in found]
    learned = kept[
        len(asked) :
    ]  # groups of what the method learns beside the weights, which the model does not have
    if type(optimizer).__name__ != saved["class"] or asked != kept[: len(asked)] or any(learned):
        raise CheckpointError(
            f"load: expected a {saved['class']} with the groups {kept}, got a {type(optimizer).__name__} with "
            f"{asked}. Make it from model.parameters(), with the groups of the saved one."
        )
    state = {
        "state": {int(key): _whole(state, tensors) for key, state in saved["state"].items()},
        "param_groups": [_whole(group, tensors) for group in saved["groups"]],
    }
    members = [[by_name[name] for name in group] for group in expected]
    with _as_it_was_on_failure(optimizer):
        for parameters in members[len(asked) :]:
            optimizer.add_param_group({"params": parameters})
        for group, parameters in zip(optimizer.param_groups, members, strict=True):
            group["params"] = parameters
        optimizer.state.clear()
        optimizer.load_state_dict(state)
        if type(optimizer).__module__.startswith("torch.optim."):
            _check_state(optimizer)


def _check_state(optimizer: Optimizer) -> None:
    """Raise CheckpointError where what an optimizer of PyTorch keeps could not be of its parameters.

    Numbers of one entry aside, it has the size of the parameter, or 1, in every dimension; all keep the same things.
    """
    known = {id(parameter) for parameter in _parameters(optimizer)}
    names = [set(state) for state in optimizer.state.values() if state]
    if any(keys != names[0] for keys in names):
        raise CheckpointError(f"load: expected the same state for every parameter, got {names}.")
    for parameter, state in optimizer.state.items():
        if id(parameter) not in known:
            raise CheckpointError(f"load: the optimizer's state is of {parameter!r}, which it does not hold.")
        for name, value in state.items():
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if shape and (
                len(shape) != parameter.dim()
                or any(size not in (1, own) for size, own in zip(shape, parameter.shape, strict=True))
            ):
                raise CheckpointError(
                    f"load: expected {name!r} of the optimizer with the shape {list(parameter.shape)} of its "
                    f"parameter, got {list(shape)}; take another checkpoint."
                )


@contextmanager
def _as_it_was_on_failure(optimizer: Optimizer) -> Iterator[None]:
    """Undo what the block did to the optimizer's groups and state if it raises."""
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    known, state = optimizer.state, dict(optimizer.state)
    try:
        yield
    except BaseException:
        for group, before in groups:
            group.clear()
            group.update(before)
        optimizer.param_groups[:] = [group for group, _ in groups]
        optimizer.state = known
        known.clear()
        known.update(state)
        raise


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _new_names(model: nn.Module, sparse: SparseModule) -> dict[int, str | None]:
    """{id of a parameter of the user's model: its name in `sparse`, None where a transformation replaced it}."""
    found = dict(sparse.named_parameters(remove_duplicate=False))
    found |= {name: weight.values for name, weight in sparse.weights() if isinstance(weight, CompactWeight)}
    first = {id(parameter): name for name, parameter in sparse.named_parameters()}
    return {id(given): first.get(id(found.get(name))) for name, given in model.named_parameters()}


def _plain(values: Mapping[str, Any], where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {key: _plain_value(value, f"{where}/{key}", tensors) for key, value in values.items()}


def _plain_value(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"tensor": where}
    if isinstance(value, tuple | list):
        items = [_plain_value(item, f"{where}/{k}", tensors) for k, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"save: the optimizer keeps {where!r} as {type(value).__name__}; expected tensors and plain values. Save it "
        "with torch.save(optimizer.state_dict())."
    )


def _whole(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {key: _whole_value(value, tensors) for key, value in values.items()}


def _whole_value(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_whole_value(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_whole_value(item, tensors) for item in value["tuple"])
    return tensors[value["tensor"]].clone()
