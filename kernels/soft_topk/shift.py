"""The one number behind a soft top-k with linear costs, and its gradient: Tai et al. 2022, arXiv:2205.14107.

The mask that spends a budget k with entropy 1 / beta is ``m = sigmoid(beta * v / c + shift)``, where the shift solves
``sum of c * m = k``.  The paper comes to it by Sinkhorn iterations (algorithm 4); here it is Newton's method on one
number, one pass over the values for each step.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxsparse.errors import NumericsError
from fxsparse.kernels.library import define

MOST_STEPS = 100
"""Newton takes 3 to 6; bisection alone would end within this many."""


def sums(values: Tensor, costs: Tensor, beta: float, shift: float) -> Tensor:
    """``[sum of c * m, sum of c * m * (1 - m)]``, fp64, at this shift; `costs` [n] or [1]."""
    x = values * (beta / costs) + shift
    mask = torch.sigmoid(x)
    return torch.stack([(costs * part).sum(dtype=torch.float64) for part in (mask, mask * torch.sigmoid(-x))])


def _sums_fake(values: Tensor, costs: Tensor, beta: float, shift: float) -> Tensor:
    return values.new_empty(2, dtype=torch.float64)


define("soft_topk_sums(Tensor values, Tensor costs, float beta, float shift) -> Tensor", sums, _sums_fake)


@torch.library.custom_op("fxsparse::soft_topk_shift", mutates_args=())
def soft_topk_shift(
    values: Sequence[Tensor], costs: Sequence[Tensor], budget: Tensor, beta: Tensor
) -> Tensor:
    """The shift at which the masks of all `values` together cost `budget`: fp64 scalar, differentiable in the values.

    For each of the values, of any shape, a tensor of costs above 0: one, or as many.  `budget`, in units of cost, and
    `beta` are scalars.  The shift is -inf for a budget of 0, and inf for one that pays for everything.

    Raises:
        NumericsError: values that are not finite, or costs that are not above 0.
    """
    parts = [_Part.of(v, c) for v, c in zip(values, costs, strict=True) if v.numel()]
    k, total = float(budget), sum(part.total for part in parts)
    if not 0 < k < total:
        return torch.tensor(math.copysign(math.inf, k - total / 2), dtype=torch.float64, device=beta.device)
    _check(parts)
    shift = _newton(lambda at: _evaluate(parts, float(beta), at), parts, k, float(beta))
    return torch.tensor(shift, dtype=torch.float64, device=beta.device)


@soft_topk_shift.register_fake
def _(values, costs, budget, beta):
    return beta.new_empty((), dtype=torch.float64)


def _setup(ctx, inputs, output) -> None:
    values, costs, _, beta = inputs
    ctx.save_for_backward(*values, *costs, beta, output)


def _backward(ctx, grad: Tensor):
    """``-beta * m * (1 - m) / sum of c * m * (1 - m)`` for every value: where the shift goes to keep the cost.

    0 where beta is so large that every m is 0 or 1 in float32.
    """
    *tensors, beta, shift = ctx.saved_tensors
    values, costs = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    slopes = [_slope(v, c, beta, shift) for v, c in zip(values, costs, strict=True)]
    total = sum((c.expand_as(s) * s).sum(dtype=torch.float64) for s, c in zip(slopes, costs, strict=True))
    moves = shift.isfinite() & (total > torch.finfo(torch.float32).tiny)
    factor = torch.where(moves, -grad * beta, 0)
    total = torch.where(moves, total, 1)
    grads = [
        (s / total.to(s.dtype) * factor.to(s.dtype)).to(v.dtype) for s, v in zip(slopes, values, strict=True)
    ]
    return grads, [None] * len(costs), None, None


def _slope(values: Tensor, costs: Tensor, beta: Tensor, shift: Tensor) -> Tensor:
    """``m * (1 - m)``, in at least fp32."""
    precise = _precise(values)
    x = precise * (beta.to(precise.dtype) / costs.to(precise.dtype)) + shift.to(precise.dtype)
    return torch.sigmoid(x) * torch.sigmoid(-x)


soft_topk_shift.register_autograd(_backward, setup_context=_setup)


class _Part:
    """The values of one weight, and what they cost."""

    def __init__(self, values: Tensor, costs: Tensor) -> None:
        self.values, self.costs = values, costs
        self.total = float(costs.sum(dtype=torch.float64)) * (len(values) if len(costs) == 1 else 1)

    def ends(self) -> tuple[float, float]:
        """The least and the largest value for each unit of cost."""
        alike = len(self.costs) == 1
        low, high = (self.values if alike else self.values / self.costs).aminmax()
        scale = float(self.costs) if alike else 1.0
        return float(low) / scale, float(high) / scale

    @staticmethod
    def of(values: Tensor, costs: Tensor) -> "_Part":
        flat = _precise(values.detach()).reshape(-1).contiguous()
        return _Part(flat, costs.detach().to(flat.dtype).reshape(-1).contiguous())


def _check(parts: Sequence[_Part]) -> None:
    finite = all(bool(part.values.sum().isfinite()) for part in parts)
    if not finite or not all(bool((part.costs > 0).all()) and math.isfinite(part.total) for part in parts):
        raise NumericsError(
            "soft top-k: expected finite values and finite costs above 0, got others. Where the costs are right, the "
            "weights have diverged: look at the loss and the learning rate."
        )


def _evaluate(parts: Sequence[_Part], beta: float, shift: float) -> tuple[float, float]:
    each = [
        (sums if part.values.dtype == torch.float64 else torch.ops.fxsparse.soft_topk_sums)(
            part.values, part.costs, beta, shift
        )
        for part in parts
    ]
    mass, slope = torch.stack(each).sum(0).tolist()
    return mass, slope


def _newton(
    evaluate: Callable[[float], tuple[float, float]], parts: Sequence[_Part], k: float, beta: float
) -> float:
    """Newton's method on the logit of the share that is kept, within a bracket.

    That logit is a straight line where all ``v / c`` are alike, and nearly one at both ends.
    """
    total = sum(part.total for part in parts)
    goal = math.log(k) - math.log(total - k)
    ends = [part.ends() for part in parts]
    bottom, top = goal - beta * max(high for _, high in ends), goal - beta * min(low for low, _ in ends)
    shift = goal - beta * sum(float(part.values.mean()) * len(part.values) for part in parts) / total
    exact = max(torch.finfo(part.values.dtype).eps for part in parts)
    for _ in range(MOST_STEPS):
        mass, slope = evaluate(shift)
        if abs(mass - k) <= 1e-13 * k:
            break
        bottom, top = (shift, top) if mass < k else (bottom, shift)
        before, shift = shift, _next(shift, mass, slope, total, goal, bottom, top)
        if abs(shift - before) <= exact * max(1.0, abs(shift)):
            break
    return shift


def _next(
    shift: float, mass: float, slope: float, total: float, goal: float, bottom: float, top: float
) -> float:
    """Newton's next shift where it stays inside the bracket, else the middle."""
    if 0 < mass < total and slope > 0:
        error = math.log(mass) - math.log(total - mass) - goal
        step = shift - error * mass * (total - mass) / (total * slope)
        if bottom < step < top:
            return step
    return (bottom + top) / 2


def _precise(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
