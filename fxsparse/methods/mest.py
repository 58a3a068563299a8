"""MEST: memory-economic sparse training, with an exact or a soft memory bound."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Method, Probe, WeightView, register
from fxsparse.options import check_flag, check_number, check_steps, is_number
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask
from fxsparse.rules import UniformRandom
from fxsparse.schedule import Schedule
from fxsparse.scores import score_named
from fxsparse.topk import top_positions


@dataclass(frozen=True)
class Phases:
    """A share as a function of the step: ``shares[k]`` in the k-th phase, of which those after the first begin at
    `starts`.
    """

    starts: tuple[int, ...]
    shares: tuple[float, ...]

    def __call__(self, step: int) -> float:
        return self.shares[bisect_right(self.starts, step)]


@dataclass(frozen=True)
class UpperBound:
    """The final nnz and a share of it more: what EM&S has room for in a phase."""

    excess: Phases

    def __call__(self, step: int, final: int, numel: int) -> int:
        return min(numel, final + round(final * self.excess(step)))


@dataclass(frozen=True)
class DropAndGrowBlind:
    """Drop the lowest ``|w| + lambda |g|`` of the active entries to the lower bound, grow at random to the upper one.

    The upper bound is the weight's nnz; the lower one its final nnz, or without `soft` a share of that less.  An entry
    that is dropped may be grown again, and then keeps its value and state.
    """

    soft: bool
    gradient: float

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Tensor:
        lower = view.final - (0 if self.soft else round(view.final * view.drop_fraction))
        if lower == len(view.active) == view.nnz:
            return view.active
        score = view.values.detach().abs()
        if self.gradient:
            score = score + self.gradient * view.active_gradient().detach().abs()
        return UniformRandom().fill(view, view.active[top_positions(score, lower)])


@register
def mest(
    steps: int = 125_120,
    every: int = 3_910,
    soft: bool = False,
    gradient: float = 0.0,
    exchange: Sequence[float] = (0.2, 0.1, 0.0),
    phases: Sequence[float] = (0.5625, 0.75),
    init: str = "random",
) -> Method:
    """Exchange entries without any gradient beyond the active ones: Yuan et al. 2021, arXiv:2110.14032.

    ``soft=False`` is EM: an update drops every weight by `exchange` below its nnz and grows it back at random, to the
    same count always.  ``soft=True`` is EM&S: it drops to the final nnz and grows to `exchange` above it, so that
    memory is softly bounded, and the last phase, which grows nothing, ends on the plan's count.  Entries are ranked by
    ``|w| + gradient |g|``, g of the step just taken (lambda; 0 in the authors' code, 0.01 in others').  Grown weights
    start at 0, so that what has learned little until the next update goes first.

    `exchange` are shares of the final nnz in the phases that `phases`, shares of `steps`, separate: the paper's bounds
    0.92, 0.91, 0.9 (EM) and 0.88, 0.89, 0.9 (EM&S) at sparsity 0.9, from epochs 0, 90 and 120 of 160, updates every 5
    epochs of 782 steps.  EM may be stored compact; EM&S, whose count changes, is masked.
    """
    check_steps("steps", steps, 1)
    check_flag("soft", soft)
    check_number("gradient, the factor lambda of |g|,", gradient, 0)
    starts = tuple(round(share * steps) for share in _shares(phases, "phases"))
    exchange = _shares(exchange, "exchange")
    if len(exchange) != len(starts) + 1 or list(starts) != sorted(set(starts)) or (soft and exchange[-1]):
        raise PlanError(
            f"expected ascending phases, one exchange more than these, and for soft=True a last one of 0, got "
            f"phases={list(phases)} of {steps} steps and exchange={list(exchange)}."
        )
    if Schedule(every, start=every).last_update(steps - 1) < max(starts, default=0):
        raise PlanError(
            f"expected an update in the last phase, steps {starts[-1:]} to {steps}: every={every}."
        )
    table = Phases(starts, exchange)
    return Method(
        name="mest",
        reparam=HardMask(),
        init=score_named(init),
        rule=DropAndGrowBlind(soft, float(gradient)),
        schedule=Schedule(every, steps, every, drop_fraction=table, ramp=UpperBound(table) if soft else None),
        source="arXiv:2110.14032",
        pattern=Unstructured(),
    )


def _shares(values: Sequence[float], name: str) -> tuple[float, ...]:
    if not isinstance(values, tuple | list) or not all(is_number(v) and 0 <= v < 1 for v in values):
        raise PlanError(f"expected {name} as shares from 0 to below 1, got {values!r}.")
    return tuple(float(value) for value in values)
