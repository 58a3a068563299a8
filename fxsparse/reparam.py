"""How a stored weight becomes the effective weight, and how the gradient flows back.

Each reparametrisation names one module-level function of (weight, mask, ...) per kind of step, which a pass
puts in a graph as ``call_function``.  All compile with ``torch.compile(fullgraph=True)`` and keep the dtype.

They dispatch on ``__torch_function__``, so that tracing keeps them as one node.  Without that, pickling a
GraphModule (which traces it again) would look inside, keep the forward and silently lose the gradient rule.
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxsparse.errors import PlanError
from fxsparse.method import MaskFunction, Probe, Reparam


def hard_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` where `mask`, else +0; the gradient likewise, whatever inf or NaN it holds outside."""
    if has_torch_function((weight, mask)):
        return handle_torch_function(hard_mask, (weight, mask), weight, mask)
    return torch.where(mask, weight, 0)


def hard_mask_dense_grad(weight: Tensor, mask: Tensor) -> Tensor:
    """Forward of `hard_mask`; hands back the whole gradient with respect to the effective weight."""
    if has_torch_function((weight, mask)):
        return handle_torch_function(hard_mask_dense_grad, (weight, mask), weight, mask)
    return _DenseGrad.apply(weight, mask)


def straight_through(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Forward of `hard_mask`; gradient ``g + decay * where(mask, 0, weight)``: SR-STE, arXiv:2102.04010.

    The decay term is added by every backward, as in the paper's code: k accumulated micro-batches add it k
    times, and a GradScaler divides it by the scale.
    """
    if has_torch_function((weight, mask)):
        return handle_torch_function(straight_through, (weight, mask), weight, mask, decay)
    return _StraightThrough.apply(weight, mask, decay)


class _DenseGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grads[0] + ctx.decay * torch.where(mask, 0, weight), None, None


@dataclass(frozen=True)
class HardMask:
    """Pruned entries are 0 in storage too, and get no gradient."""

    exact_zeros: ClassVar[bool] = True
    probe: ClassVar[Probe] = Probe.NONE

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        return (hard_mask_dense_grad if dense_grad else hard_mask), ()

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool) -> Tensor:
        return _effective(self, weight, mask, dense_grad)

    def fold(self, weight: Tensor, mask: Tensor) -> Tensor:
        return hard_mask(weight.detach(), mask)


@dataclass(frozen=True)
class HiddenMask:
    """Pruned entries keep their value behind the mask, without a gradient, and may come back with it."""

    exact_zeros: ClassVar[bool] = False
    probe: ClassVar[Probe] = Probe.NONE

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        return (hard_mask_dense_grad if dense_grad else hard_mask), ()

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool) -> Tensor:
        return _effective(self, weight, mask, dense_grad)

    def fold(self, weight: Tensor, mask: Tensor) -> Tensor:
        return hard_mask(weight.detach(), mask)


@dataclass(frozen=True)
class StraightThrough:
    """Pruned entries keep their value, get the whole gradient, and decay (0: the plain estimator)."""

    decay: float = 2e-4
    exact_zeros: ClassVar[bool] = False
    probe: ClassVar[Probe] = Probe.DENSE

    def __post_init__(self) -> None:
        number = isinstance(self.decay, int | float) and not isinstance(self.decay, bool)
        if not number or not isfinite(self.decay) or self.decay < 0:
            raise PlanError(f"expected decay as a number >= 0, got {self.decay!r}. SR-STE uses 2e-4.")

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        del dense_grad  # the gradient is dense at every step
        return straight_through, (self.decay,)

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool) -> Tensor:
        return _effective(self, weight, mask, dense_grad)

    def fold(self, weight: Tensor, mask: Tensor) -> Tensor:
        return hard_mask(weight.detach(), mask)


def _effective(reparam: Reparam, weight: Tensor, mask: Tensor, dense_grad: bool) -> Tensor:
    function, arguments = reparam.function(dense_grad)
    return function(weight, mask, *arguments)
