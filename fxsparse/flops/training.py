"""Training FLOPs per step, by the formulas of RigL's appendix H (arXiv:1911.11134).

f_S and f_D are forward FLOPs of the sparse and the dense model; a step costs three forwards.
Normalisation, the loss and the selection of entries are left out, as in the paper.
"""

from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from typing import Any

from sympy import Min

from fxsparse.errors import PlanError
from fxsparse.method import Method, Probe, SampledRule

Forward = Callable[[Mapping[str, float]], float]
"""{weight: nonzeros} -> FLOPs of one forward."""


def train_flops(
    method: Method,
    forward: Forward,
    counts: Mapping[str, float],
    numels: Mapping[str, int],
    settled: Collection[str] = (),
) -> float:
    """FLOPs of an average training step; divide by ``3 * forward(numels)`` for the ratio to dense training.

    ``3 f_S`` plus what `probe_flops` says.  A ramp of the nonzeros (GMP, AC/DC's phases) is averaged from step 0 to its
    end, but for weights that are `settled`, which have their count at every step.  Where weight gradients are of a
    superset of the entries (Top-KAST, arXiv:2106.03517): ``2 f(A) + f(B)``.
    """
    if method.schedule is not None and method.schedule.ramp is not None:
        counts = average_counts(method, counts, numels) | {name: counts[name] for name in settled}
    sparse, dense = forward(counts), forward(numels)
    more = gradient_per_entry(method)
    if more is not None:
        return 2 * sparse + forward({n: min(float(numels[n]), more * c) for n, c in counts.items()})
    return 3 * sparse + probe_flops(method, sparse, dense)


def gradient_per_entry(method: Method) -> float | None:
    """Entries that get a weight gradient at every step, for each active one; None: those alone, or all."""
    return getattr(method.reparam, "gradient_per_entry", None)


def probe_flops(method: Method, sparse: Any, dense: Any) -> Any:
    """What gradients beyond the active entries add to an average step.

    `sparse` and `dense` are the FLOPs of a weight gradient, numbers or sympy.  A dense gradient at every step
    (SNFS, straight-through) adds ``dense - sparse``: ``2 f_S + f_D`` in all.  One at each update (RigL) adds
    the same, spread over the steps: ``(3 f_S dT + 2 f_S + f_D) / (dT + 1)`` in all.  A sampled one (GSE,
    arXiv:2401.06898) adds ``gamma sparse`` for gamma candidates per active entry, spread likewise:
    ``(3 f_S dT + 2 f_S + (1 + gamma) f_S) / (dT + 1)`` in all.

    Raises:
        PlanError: a rule with Probe.SAMPLED or GUIDED that does not say how many candidates it has.
    """
    more = gradient_per_entry(method)
    if more is not None:
        return Min(dense, more * sparse) - sparse
    if method.reparam.probe is Probe.DENSE:
        return dense - sparse
    if method.rule is None or not method.rule.probe.collects:
        return 0 * sparse
    if method.rule.probe is Probe.DENSE:
        return (dense - sparse) * update_share(method)
    if not isinstance(method.rule, SampledRule):
        raise PlanError(
            f"method {method.name!r}: a rule with Probe.{method.rule.probe.name} needs `candidates`, the sampled pairs "
            f"per active entry, and {type(method.rule).__name__} has none."
        )
    return method.rule.candidates * sparse * update_share(method)


def update_share(method: Method) -> Fraction:
    """Updates per training batch.

    1 in every + 1 where no optimizer step is taken at an update, which RigL counts as an extra batch; 1 in
    every where the optimizer steps as well.
    """
    if method.schedule is None:
        return Fraction(0)
    if method.schedule.at is not None:
        return Fraction(len(method.schedule.at), max(1, method.schedule.stop or method.schedule.at[-1] + 1))
    return Fraction(1, method.schedule.every + (1 if method.schedule.skip_step else 0))


def average_counts(
    method: Method, counts: Mapping[str, float], numels: Mapping[str, int]
) -> dict[str, float]:
    """{weight: nonzeros averaged over the steps from 0 to the end of the method's schedule}.

    Raises:
        ValueError: the method has no schedule with an end.
    """
    if method.schedule is None or method.schedule.stop is None:
        raise ValueError(f"method {method.name!r} has no schedule that ends, so nothing to average over.")
    stop = method.schedule.stop
    moments = sorted({0, *method.schedule.updates(stop)})
    spans = [later - earlier for earlier, later in zip(moments, [*moments[1:], stop], strict=True)]

    def average(name: str) -> float:
        nnz = (method.nnz(moment, round(counts[name]), numels[name]) for moment in moments)
        return sum(n * span for n, span in zip(nnz, spans, strict=True)) / stop

    return {name: average(name) for name in counts}
