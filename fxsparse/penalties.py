"""A method's penalty, by its gradient alone: what it adds to ``.grad`` before a step of the optimizer."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxsparse.errors import InvariantError
from fxsparse.method import Held, Penalty
from fxsparse.sharding import here, part, whole
from fxsparse.storage import CompactWeight, MaskedWeight
from fxsparse.update_mask import Target


@torch.no_grad()
def add_penalty(
    penalty: Penalty,
    weights: Iterator[tuple[str, MaskedWeight | CompactWeight]],
    targets: Mapping[str, Target],
    step: int,
    optimizer: Optimizer,
) -> Tensor | None:
    """Add to the gradients of weights and learned extras in place; the norm of what was added, on their device.

    What has no gradient in this step stays without.  A fused optimizer divides by its scale later on, so that it is
    multiplied by it here.
    """
    stores = [(name, store) for name, store in weights if isinstance(store, MaskedWeight)]
    held = [
        Held(
            name,
            whole(store.parameter),
            store.mask,
            {n: whole(t) for n, t in store.extras.items()},
            targets[name].nnz,
        )
        for name, store in stores
    ]
    scale = getattr(optimizer, "grad_scale", None)
    squares = []
    for (name, store), added in zip(stores, penalty(held, step), strict=True):
        trained = {"weight": store.parameter, **store.extras}
        for key, gradient in added.items():
            if key not in trained or trained[key].shape != gradient.shape:
                raise InvariantError(
                    f"the penalty of {name!r} gives {key!r} {list(gradient.shape)}: expected gradients of "
                    f"{ ({key: list(tensor.shape) for key, tensor in trained.items()}) }."
                )
            own = trained[key].grad
            if own is not None:
                here(own).add_(part(own, gradient if scale is None else gradient * scale))
                squares.append(gradient.float().square().sum())
    return torch.stack(squares).sum().sqrt() if squares else None
