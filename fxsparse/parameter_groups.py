"""Groups for an optimizer: the user's parameters, and what a method learns beside the weights, with its own options."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import PlanError
from fxsparse.method import Extra
from fxsparse.storage import CompactWeight, MaskedWeight

Learned = list[tuple[str, Tensor, Extra]]
"""(name in the state dict, Parameter, what the method says of it)."""


def extras_held(
    weights: Iterable[tuple[str, MaskedWeight | CompactWeight]], extras: Sequence[Extra]
) -> Learned:
    """The learned tensors beside the weights."""
    return [
        (f"{name}_{extra.name}", weight.extras[extra.name], extra)
        for name, weight in weights
        if isinstance(weight, MaskedWeight)
        for extra in extras
        if extra.learned
    ]


def parameter_groups(
    module: nn.Module, learned: Learned, lr: float, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """One group of the user's parameters at `lr` and `options`, and one for each kind of learned tensor."""
    beside = {id(tensor) for _, tensor, _ in learned}
    groups = [{"params": [p for p in module.parameters() if id(p) not in beside], "lr": lr, **options}]
    return groups + [
        {"params": [t for _, t, e in learned if e == extra], **_hints(extra, lr)}
        for extra in dict.fromkeys(extra for *_, extra in learned)
    ]


def add_groups(optimizer: Optimizer, learned: Learned) -> None:
    """Let an optimizer that was made before the learned tensors hold them too."""
    for extra in dict.fromkeys(extra for *_, extra in learned):
        tensors = [tensor for _, tensor, own in learned if own == extra]
        optimizer.add_param_group(
            {"params": tensors, **_hints(extra, float(optimizer.param_groups[0]["lr"]))}
        )


def check_hints(optimizer: Optimizer, learned: Learned, method: str) -> None:
    """Raise PlanError where the optimizer does not hold a learned tensor, and warn where it decays one otherwise or
    learns it at the rate of the weights where the method has another.
    """
    own = {id(tensor) for _, tensor, _ in learned}
    held = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    for name, tensor, extra in learned:
        group = held.get(id(tensor))
        if group is None:
            raise PlanError(
                f"attach: the optimizer does not hold {name!r}, which {method} learns: expected an optimizer made from "
                "sparse.parameter_groups(lr), or one that is passed to compile(..., optimizer=optimizer)."
            )
        if group.get("weight_decay", 0.0) != extra.weight_decay:
            warnings.warn(
                f"the optimizer has weight_decay={group['weight_decay']} for {name!r}, expected {extra.weight_decay} "
                f"as {method} says: make it from sparse.parameter_groups(lr, weight_decay=...).",
                stacklevel=4,
            )
            return
        if extra.lr != 1 and any(id(tensor) not in own for tensor in group["params"]):
            warnings.warn(
                f"{name!r} learns at the rate of the weights, expected {extra.lr:g} times that as {method} says: make "
                "the optimizer from sparse.parameter_groups(lr).",
                stacklevel=4,
            )
            return


def _hints(extra: Extra, lr: float) -> dict[str, Any]:
    return {"lr": lr * extra.lr, "weight_decay": extra.weight_decay}
