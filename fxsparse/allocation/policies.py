"""The policies by name, and what a plan's `allocation` field means."""

from collections.abc import Callable, Mapping, Sequence

from fxsparse.allocation.er import er
from fxsparse.allocation.er_unrolled import er_unrolled
from fxsparse.allocation.erk import erk
from fxsparse.allocation.explicit import Explicit
from fxsparse.allocation.global_magnitude import global_magnitude
from fxsparse.allocation.target import Target, Weight
from fxsparse.allocation.uniform import uniform
from fxsparse.errors import PlanError

Policy = Callable[[Sequence[Weight], Target], dict[str, int]]

POLICIES: dict[str, Policy] = {
    policy.__name__: policy for policy in (uniform, er, erk, er_unrolled, global_magnitude)
}


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


def check(allocation: str | Mapping[str, float | int]) -> None:
    """Raise `resolve`'s PlanError if there is one."""
    resolve(allocation)
