"""What one call site costs per training step, in three columns that are never mixed."""

from dataclasses import dataclass, replace

from sympy import Expr, Float, Integer

from fxsparse.flops.conventions import Convention
from fxsparse.flops.site import ZERO, CallSite
from fxsparse.flops.training import probe_flops
from fxsparse.method import Method


@dataclass(frozen=True)
class Phases:
    """FLOPs of one training step at one call site, symbolic in batch and sequence."""

    forward: Expr = ZERO
    grad_input: Expr = ZERO
    grad_weight: Expr = ZERO
    update: Expr = ZERO
    """What mask updates add, spread over the steps between them; selecting the entries is not counted."""

    @property
    def total(self) -> Expr:
        """All four."""
        return self.forward + self.grad_input + self.grad_weight + self.update


@dataclass(frozen=True)
class SiteFlops:
    """The columns of one call site; ``node.meta["flops"]``."""

    name: str
    op: str
    weight: str | None
    dense: Phases
    sparse: Phases
    """Theoretical: nonzeros only."""
    executed: Phases
    """What the storage really computes: all entries where it is masked, stored ones where it is compact."""

    def __str__(self) -> str:
        return (
            f"{self.dense.forward} dense, {self.sparse.forward} theoretical, {self.executed.forward} executed"
        )


@dataclass(frozen=True)
class Stored:
    """How one weight is held, as far as counting goes."""

    nnz: int
    numel: int
    compact: bool = False
    density: float | None = None
    """What the allocation aimed at, before any rounding; None: ``nnz / numel``."""
    settled: bool = False
    """It has this count at every step, whatever the method does to others on the way."""

    def entries(self, nominal: bool) -> float:
        """Nonzeros to count: those that there are, or the real number that was aimed at."""
        return self.nnz if self.density is None or not nominal else self.density * self.numel


def site_flops(
    site: CallSite, convention: Convention, stored: Stored | None = None, method: Method | None = None
) -> SiteFlops:
    """Count one call, its weight held as in `stored` (None: dense) and its mask updated by `method`."""
    dense = _phases(site, convention, Integer(site.numel))
    if stored is None or stored.entries(convention.nominal) == stored.numel:
        return SiteFlops(site.name, site.op, site.weight, dense, dense, dense)
    sparse = _phases(site, convention, nonzeros(site, stored.entries(convention.nominal)))
    if method is not None:
        sparse = replace(sparse, update=probe_flops(method, sparse.grad_weight, dense.grad_weight))
    return SiteFlops(site.name, site.op, site.weight, dense, sparse, sparse if stored.compact else dense)


def nonzeros(site: CallSite, nnz: float) -> Expr:
    """Nonzeros that a call reads of a parameter that has `nnz`: all, or its share of them, rounded down."""
    if isinstance(nnz, float):
        return Float(nnz) * site.fraction
    return Integer(nnz) * site.fraction if site.fraction == 1 else Integer(int(nnz * site.fraction))


def _phases(site: CallSite, convention: Convention, nnz: Expr) -> Phases:
    forward = convention.forward(site, nnz)
    if site.is_product:
        return Phases(forward, convention.forward(replace(site, products=site.grad_products), nnz))
    return Phases(forward, site.grad_input * forward, forward if site.grad_weight else ZERO)
