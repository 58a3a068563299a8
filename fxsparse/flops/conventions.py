"""What counts as a FLOP: the conventions by name."""

from collections.abc import Callable
from dataclasses import dataclass

from sympy import Expr

from fxsparse.errors import PlanError
from fxsparse.flops.cerebras import cerebras
from fxsparse.flops.mac2 import mac2
from fxsparse.flops.rigl import rigl
from fxsparse.flops.site import CallSite


@dataclass(frozen=True)
class Convention:
    """What counts as a FLOP."""

    name: str
    forward: Callable[[CallSite, Expr], Expr]
    """(call site, nonzeros that it reads of its weight) -> FLOPs of one forward."""
    nominal: bool = False
    """Counts the density that the allocation aims at, a real number, not the entries that are there."""


CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention("mac2", mac2),
        Convention("rigl", rigl, nominal=True),
        Convention("cerebras", cerebras),
    )
}


def resolve(name: str) -> Convention:
    """The convention of that name; PlanError lists the known ones."""
    if name not in CONVENTIONS:
        raise PlanError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {name!r}.")
    return CONVENTIONS[name]
