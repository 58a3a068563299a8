"""The policies by name, and what a plan's `allocation` field means."""

from collections.abc import Callable, Mapping, Sequence

from fxsparse.allocation.er import er, er_densities
from fxsparse.allocation.er_unrolled import er_unrolled, er_unrolled_densities
from fxsparse.allocation.erk import erk, erk_densities
from fxsparse.allocation.explicit import Explicit
from fxsparse.allocation.global_magnitude import global_magnitude, global_score
from fxsparse.allocation.target import Target, Weight
from fxsparse.allocation.uniform import uniform, uniform_densities
from fxsparse.errors import PlanError

Policy = Callable[[Sequence[Weight], Target], dict[str, int]]

Densities = Callable[[Sequence[Weight], Target], dict[str, float]]

POLICIES: dict[str, Policy] = {
    policy.__name__: policy for policy in (uniform, er, erk, er_unrolled, global_magnitude, global_score)
}

DENSITIES: dict[str, Densities] = {
    "uniform": uniform_densities,
    "er": er_densities,
    "erk": erk_densities,
    "er_unrolled": er_unrolled_densities,
}
"""What a policy aims at before it makes integers, where that is a number of its own."""


def resolve(allocation: str | Mapping[str, float | int]) -> Policy:
    """The policy that a plan's `allocation` field asks for.

    Raises:
        PlanError: an unknown name (the message lists the known ones), or a table with a bad value.
    """
    if isinstance(allocation, Mapping):
        return Explicit(allocation)
    if not isinstance(allocation, str) or allocation not in POLICIES:
        raise PlanError(
            f"allocation: expected {', '.join(POLICIES)} or {{glob: sparsity}}, got {allocation!r}."
        )
    return POLICIES[allocation]


def target_densities(
    allocation: str | Mapping[str, float | int], specs: Sequence[Weight], target: Target
) -> dict[str, float]:
    """{name: density} before any rounding to counts: what published FLOP tables are computed from."""
    if isinstance(allocation, Mapping):
        allocation, target = "uniform", Explicit(allocation).force(specs, target)
    if allocation in DENSITIES:
        return DENSITIES[allocation](specs, target) | target.forced_densities(specs)
    counts = resolve(allocation)(specs, target)
    return {s.name: counts[s.name] / s.numel for s in specs}


def check(allocation: str | Mapping[str, float | int]) -> None:
    """Raise `resolve`'s PlanError if there is one."""
    resolve(allocation)
