"""How a stored weight becomes the effective weight, and how the gradient flows back.

Each reparametrisation names one module-level function of (weight, mask, ...) per kind of step, which a pass
puts in a graph as ``call_function``.  All compile with ``torch.compile(fullgraph=True)`` and keep the dtype.

They dispatch on ``__torch_function__``, so that tracing keeps them as one node.  Without that, pickling a
GraphModule (which traces it again) would look inside, keep the forward and silently lose the gradient rule.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxsparse.errors import PlanError
from fxsparse.method import Extra, MaskFunction, Probe, Reparam
from fxsparse.options import is_number


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


def one_node(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a function of tensors that comes before anything else: tracing keeps its calls as one node."""

    @functools.wraps(function)
    def node(*args: Any) -> Tensor:
        tensors = tuple(arg for arg in args if not isinstance(arg, int | float | None))
        if has_torch_function(tensors):
            return handle_torch_function(node, tensors, *args)
        return function(*args)

    return node


def with_gradient(value: Tensor, *into: tuple[Tensor, Tensor | float | None]) -> Tensor:
    """`value`, taken as a constant, whose gradient g reaches every tensor of (tensor, factor) as ``g * factor``.

    That is the gradient rule of a reparametrisation as data, tensor by tensor: None hands on g itself (straight
    through), a mask only what it keeps, a mask of more entries those (Top-KAST), ``where(mask, 1, theta)`` a part of
    the rest (Feather), a weight the gradient of its scores (movement).  A bool factor cuts what it leaves out,
    whatever inf or NaN is there.
    """
    tensors, factors = zip(*into, strict=True)
    return _WithGradient.apply(value.detach(), tuple(factors), *tensors)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factors: tuple[Tensor | float | None, ...], *into: Tensor) -> Tensor:
        ctx.numbers = [None if isinstance(factor, Tensor) else factor for factor in factors]
        ctx.where = [k for k, factor in enumerate(factors) if isinstance(factor, Tensor)]
        ctx.save_for_backward(*(factor.detach() for factor in factors if isinstance(factor, Tensor)))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factors = list(ctx.numbers)
        for place, factor in zip(ctx.where, ctx.saved_tensors, strict=True):
            factors[place] = factor
        return None, None, *(_scaled(grads[0], factor) for factor in factors)


def _scaled(grad: Tensor, factor: Tensor | float | None) -> Tensor:
    if isinstance(factor, Tensor) and factor.dtype == torch.bool:
        return torch.where(factor, grad, 0)
    return grad if factor is None else grad * factor


@dataclass(frozen=True)
class Filled:
    """The start of an `Extra` of one number for each weight, fp32 without dimensions."""

    value: float

    def __call__(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        del mask, generator
        return weight.new_full((), self.value, dtype=torch.float32)


@dataclass(frozen=True)
class Zeros:
    """The start of an `Extra` of the weight's shape, of its dtype or of `dtype`."""

    dtype: torch.dtype | None = None

    def __call__(self, weight: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        del mask, generator
        return torch.zeros_like(weight, dtype=self.dtype)


@dataclass(frozen=True)
class ValueMap:
    """A reparametrisation by one function ``f(weight, mask, *extras, *numbers)``, which says its gradient too.

    `f` is decorated by `one_node` at module level of an importable module.  The effective weight, inference and
    ``to_dense`` are what f returns, and not ``weight * mask``.
    """

    f: MaskFunction
    numbers: tuple[float, ...] = ()
    extras: tuple[Extra, ...] = ()
    exact_zeros: bool = False
    probe: Probe = Probe.DENSE
    """Of the gradient that f hands to the weight at every step: DENSE, or NONE where it is that of the mask alone."""
    gradient_per_entry: float | None = None
    """Of a gradient between these two: entries of the weight that get one for each active entry."""
    learns: str = ""
    """An extra, a bool mask: outside of it an optimizer step leaves the weight as it is."""
    linear: Callable[..., Tensor] | None = None
    """In the place of ``F.linear(x, effective, bias)``, with a backward of its own: a function of (x, effective, bias,
    mask, *extras, step, key, *numbers), under `one_node`; see `insert-linear-rule`."""
    by_rows: bool = False
    """f looks along rows, so that weights stored [in, out] are refused."""

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        del dense_grad
        return self.f, self.numbers

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool, *extras: Tensor) -> Tensor:
        del dense_grad
        return self.f(weight, mask, *extras, *self.numbers)

    def fold(self, weight: Tensor, mask: Tensor, *extras: Tensor) -> Tensor:
        with torch.no_grad():
            return self.f(weight.detach(), mask, *extras, *self.numbers)


@dataclass(frozen=True)
class HardMask:
    """Pruned entries are 0 in storage too, and get no gradient."""

    exact_zeros: bool = field(default=True, init=False, repr=False)
    probe: Probe = field(default=Probe.NONE, init=False, repr=False)

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        return (hard_mask_dense_grad if dense_grad else hard_mask), ()

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool, *extras: Tensor) -> Tensor:
        return _effective(self, weight, mask, dense_grad, *extras)

    def fold(self, weight: Tensor, mask: Tensor, *extras: Tensor) -> Tensor:
        return hard_mask(weight.detach(), mask)


@dataclass(frozen=True)
class HiddenMask:
    """Pruned entries keep their value behind the mask, without a gradient, and may come back with it."""

    exact_zeros: bool = field(default=False, init=False, repr=False)
    probe: Probe = field(default=Probe.NONE, init=False, repr=False)

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        return (hard_mask_dense_grad if dense_grad else hard_mask), ()

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool, *extras: Tensor) -> Tensor:
        return _effective(self, weight, mask, dense_grad, *extras)

    def fold(self, weight: Tensor, mask: Tensor, *extras: Tensor) -> Tensor:
        return hard_mask(weight.detach(), mask)


@dataclass(frozen=True)
class StraightThrough:
    """Pruned entries keep their value, get the whole gradient, and decay (0: the plain estimator)."""

    decay: float = 2e-4
    exact_zeros: bool = field(default=False, init=False, repr=False)
    probe: Probe = field(default=Probe.DENSE, init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_number(self.decay) or self.decay < 0:
            raise PlanError(f"expected decay as a number >= 0, got {self.decay!r}. SR-STE uses 2e-4.")

    def function(self, dense_grad: bool) -> tuple[MaskFunction, tuple[float, ...]]:
        del dense_grad  # the gradient is dense at every step
        return straight_through, (self.decay,)

    def effective(self, weight: Tensor, mask: Tensor, dense_grad: bool, *extras: Tensor) -> Tensor:
        return _effective(self, weight, mask, dense_grad, *extras)

    def fold(self, weight: Tensor, mask: Tensor, *extras: Tensor) -> Tensor:
        return hard_mask(weight.detach(), mask)


def _effective(reparam: Reparam, weight: Tensor, mask: Tensor, dense_grad: bool, *extras: Tensor) -> Tensor:
    function, arguments = reparam.function(dense_grad)
    return function(weight, mask, *extras, *arguments)
