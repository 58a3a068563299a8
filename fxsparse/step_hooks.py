"""What is asked around a step of the optimizer: whether it was skipped or made state alone, and what was explored."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from fxsparse import sharding
from fxsparse.errors import NumericsError, PlanError, UnsupportedError
from fxsparse.method import Method
from fxsparse.observed import Evidence


@dataclass
class Each:
    """A closure of ``optimizer.step`` where masks stay, and what follows each of its backwards."""

    closure: Callable[[], Any]
    then: Callable[[], None]

    def __call__(self) -> Any:
        loss = self.closure()
        self.then()
        return loss


def checked(evidence: Evidence) -> Evidence:
    """What was explored; PlanError where nothing was, NumericsError where it is not finite."""
    if not evidence.gradients and not evidence.observed:
        raise PlanError(
            "exploring(): expected a backward through sparse weights inside the block, got none. Call "
            "loss(sparse(x), y).backward() in it, with the module in train mode."
        )
    for name, tensor in evidence.tensors():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(
                f"exploring(): expected finite gradients, got inf or NaN at {name!r}. Leave a GradScaler out of the "
                "block (only the order of gradients counts), or look at the loss."
            )
    return evidence


def check_follows(optimizer: Optimizer, method: Method) -> None:
    """UnsupportedError where the optimizer's state cannot follow masks that move."""
    if method.rule is not None and method.reparam.exact_zeros and isinstance(optimizer, LBFGS):
        raise UnsupportedError(
            "attach: LBFGS keeps a history of all parameters as one vector, which cannot follow the masks that "
            f"{method.name} moves; expected state for each element, as of SGD or AdamW. Use one of them, or static(), "
            "whose masks stay."
        )


def is_skipped(optimizer: Optimizer) -> bool:
    """GradScaler hands a fused optimizer its inf check; the hooks of such a step fire although nothing moved."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def makes_state_alone(optimizer: Optimizer) -> bool:
    """torch.distributed.checkpoint has a fresh optimizer make its state by a step with gradients of 0 at lr 0."""
    groups = optimizer.param_groups
    if optimizer.state or not all(_is_zero(group.get("lr")) for group in groups):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(sharding.whole(gradient).any()) for gradient in gradients)


def _is_zero(rate: Any) -> bool:
    """One that lies on a device is not read: that would wait for it, and break the capture of a CUDA graph."""
    return (
        rate is not None and not (isinstance(rate, Tensor) and rate.device.type != "cpu") and float(rate) == 0
    )
