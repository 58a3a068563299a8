"""Let per-element optimizer state follow a mask change, for any optimizer, by tensor shape alone."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse import sharding
from fxsparse.errors import UnsupportedError

_FIRST = {"step": 0, "mu_product": 1}
"""Numbers of a whole weight as an optimizer starts them, where it keeps them: Adam and most others, NAdam."""


def unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside a trainer's wrapper, which runs no step hooks of its own (Lightning's, Accelerate's)."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, torch.optim.Optimizer) and "_optimizer_step_post_hooks" not in vars(optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def per_element(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[Tensor]:
    """The state tensors of `parameter` that hold one number per element.

    Raises:
        UnsupportedError: other state of more than one number, which no rule says how to move (Adafactor's factors,
            8-bit blocks).
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        # By shape: beside a weight of one entry a scalar step count has as many elements as the weight.
        if not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != parameter.shape):
            continue
        if value.shape != parameter.shape or not value.is_floating_point():
            raise UnsupportedError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} and {value.dtype} for a "
                f"weight of shape {tuple(parameter.shape)}: expected one float per element, as in SGD or "
                "AdamW. State in another form cannot follow a mask change; use an optimizer with per-element state."
            )
        yield value


def check_follows(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise UnsupportedError, as `per_element` does, where state of one of them cannot follow a mask."""
    for parameter in parameters:
        for _ in per_element(optimizer, parameter):
            pass


@torch.no_grad()
def reset(
    optimizer: torch.optim.Optimizer, parameter: Tensor, entries: tuple[Tensor, ...] | None = None
) -> None:
    """Zero the state at `entries`, an index into the weight; in place, the rest keeps its state.

    Without entries all of the weight's state starts anew, the count of its steps too: by that Adam makes up for
    averages that are still near 0, and would step too far without.
    """
    for state in per_element(optimizer, parameter):
        place = ... if entries is None else sharding.entries(state, entries)
        sharding.here(state)[place] = 0
    if entries is not None:
        return
    held = optimizer.state.get(parameter, {})
    for key in _FIRST.keys() & held.keys():
        if isinstance(held[key], Tensor):  # it stays, as a fused or capturable step holds it on the device
            held[key].fill_(_FIRST[key])
        else:
            held[key] = type(held[key])(_FIRST[key])


def momentum(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> Tensor:
    """The average of gradients that the optimizer keeps: SGD's momentum, or ``exp_avg / (sqrt(exp_avg_sq) + 1e-8)``.

    Raises:
        UnsupportedError: it keeps neither for this parameter.
    """
    state = optimizer.state.get(parameter, {})
    if isinstance(state.get("momentum_buffer"), Tensor):
        return sharding.whole(state["momentum_buffer"])
    if isinstance(state.get("exp_avg"), Tensor) and isinstance(state.get("exp_avg_sq"), Tensor):
        return sharding.whole(state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8))
    raise UnsupportedError(
        f"{type(optimizer).__name__} keeps {sorted(state) or 'no state'} for {name!r}: expected the momentum buffer of "
        "SGD(momentum=0.9), or Adam's averages, which this method redistributes by."
    )


@torch.no_grad()
def rehome(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, positions: Tensor) -> None:
    """Let the optimizer hold `new`, the entries of `old` at flat `positions`, in its place; state is gathered too.

    Where `new` has room for more entries than there are positions, their state is 0.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    unused = new.numel() - positions.numel()
    moved = {
        id(state): F.pad(state.flatten()[positions], (0, unused)) for state in per_element(optimizer, old)
    }
    state = optimizer.state.pop(old)
    optimizer.state[new] = {key: moved.get(id(value), value) for key, value in state.items()}
