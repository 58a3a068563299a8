"""An optimizer as named tensors and plain values, and back."""

from collections.abc import Iterator, Mapping
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

    Raises:
        CheckpointError: nothing was saved, or for another optimizer or other groups; the optimizer is left as it was.
    """
    if saved is None:
        raise CheckpointError("load: the file holds no optimizer; it was saved without optimizer=.")
    stored = {id(parameter): _stored(sparse, name) for name, parameter in model.named_parameters()}
    by_name = dict(sparse.named_parameters())
    names = {id(parameter): name for name, parameter in by_name.items()}
    found = [
        [
            names.get(id(stored.get(id(parameter), parameter)), "of something else")
            for parameter in group["params"]
        ]
        for group in optimizer.param_groups
    ]
    left = iter(saved["names"])
    expected = [[next(left) for _ in group["params"]] for group in saved["groups"]]
    if type(optimizer).__name__ != saved["class"] or [*map(sorted, found)] != [*map(sorted, expected)]:
        raise CheckpointError(
            f"load: expected a {saved['class']} with the groups {expected}, got a {type(optimizer).__name__} with "
            f"{found}. Make it from model.parameters(), with the groups of the saved one."
        )
    for group, members in zip(optimizer.param_groups, expected, strict=True):
        group["params"] = [by_name[name] for name in members]
    optimizer.state.clear()
    optimizer.load_state_dict(
        {
            "state": {int(key): _whole(state, tensors) for key, state in saved["state"].items()},
            "param_groups": [_whole(group, tensors) for group in saved["groups"]],
        }
    )


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _stored(sparse: SparseModule, name: str) -> Tensor | None:
    weight = sparse.get_submodule(name) if name not in dict(sparse.named_parameters()) else None
    return weight.values if isinstance(weight, CompactWeight) else sparse.get_parameter(name)


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
