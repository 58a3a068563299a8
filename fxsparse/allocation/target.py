"""What every policy is given: the sparsity wanted, and which weights it may not decide."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from typing import Protocol

from torch import Tensor

from fxsparse.errors import PlanError


class Weight(Protocol):
    """The facts about a weight that an allocation may use; `fxsparse.pipeline.WeightSpec` is one."""

    @property
    def name(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def numel(self) -> int: ...


@dataclass(frozen=True)
class Target:
    """A budget of nonzeros over some weights.

    Counts are exact: sparsities are read as the decimals they were written as, so 0.9 of 1,000 leaves 100,
    where ``int(1000 * (1 - 0.9))`` is 99.
    """

    sparsity: float
    """Fraction of zeros over the weights in the budget, in [0, 1)."""
    forced: Mapping[str, float | int] = field(default_factory=dict)
    """Weights that the policy does not decide: a float is a sparsity (0.0 is dense), an int is a count."""
    keep_dense_counts: bool = False
    """Forced and excluded weights count in the budget and the others make up for them (SRigL's uniform,
    arXiv:2305.02299); else the sparsity holds over the others alone (RigL's, arXiv:1911.11134)."""
    excluded_numel: int = 0
    """Entries of weights that the plan leaves dense and that are not among the specs."""
    weight: Callable[[str], Tensor] | None = None
    """The dense tensor of a weight, for policies that look at values."""
    score: Callable[[str], Tensor] | None = None
    """What the entries of a weight are worth before training, where the caller says so."""

    def free(self, specs: Sequence[Weight]) -> list[Weight]:
        """The weights a policy decides, sorted by name so that no result depends on the order of `specs`."""
        return sorted((s for s in specs if s.name not in self.forced), key=lambda s: s.name)

    def forced_counts(self, specs: Sequence[Weight]) -> dict[str, int]:
        """{name: nnz} of the forced weights.

        Raises:
            PlanError: a count outside [1, numel]; the message has the smallest feasible density.
        """
        return {s.name: _forced_count(s, self.forced[s.name]) for s in specs if s.name in self.forced}

    def forced_densities(self, specs: Sequence[Weight]) -> dict[str, float]:
        """{name: density} of the forced weights, before any rounding."""
        wishes = {s.name: (self.forced[s.name], s.numel) for s in specs if s.name in self.forced}
        return {
            name: wish / numel if isinstance(wish, int) else 1 - wish
            for name, (wish, numel) in wishes.items()
        }

    def free_total(self, specs: Sequence[Weight]) -> int:
        """Nonzeros that the free weights share.

        Raises:
            PlanError: fewer than one per free weight, or more than they hold; the message has the bound.
        """
        free = self.free(specs)
        if not free:
            return 0
        numel = sum(s.numel for s in free)
        total = count(numel, self.sparsity)
        if self.keep_dense_counts:
            fixed = sum(self.forced_counts(specs).values()) + self.excluded_numel
            everything = sum(s.numel for s in specs) + self.excluded_numel
            total = count(everything, self.sparsity) - fixed
        if not len(free) <= total <= numel:
            raise PlanError(_infeasible(self, total, len(free), numel))
        return total

    def free_sparsity(self, specs: Sequence[Weight]) -> float:
        """Sparsity over the free weights alone; differs from `sparsity` only with `keep_dense_counts`."""
        if not self.keep_dense_counts:
            return self.sparsity
        return 1 - self.free_total(specs) / sum(s.numel for s in self.free(specs))


def count(numel: int, sparsity: float) -> int:
    """``floor(numel * (1 - sparsity))``, computed on the decimal that `sparsity` prints as."""
    return floor(numel * (1 - Fraction(repr(float(sparsity)))))


def _forced_count(spec: Weight, wish: float) -> int:
    nnz = wish if isinstance(wish, int) else count(spec.numel, wish)
    if 1 <= nnz <= spec.numel:
        return nnz
    raise PlanError(
        f"weight {spec.name!r} of shape {tuple(spec.shape)}: expected 1 to {spec.numel} nonzeros, got {nnz} "
        f"from {'nnz' if isinstance(wish, int) else 'sparsity'} {wish}; its smallest feasible density is "
        f"{1 / spec.numel:.3g}."
    )


def _infeasible(target: Target, total: int, least: int, most: int) -> str:
    why = " once the weights with a fixed count are paid for" if target.keep_dense_counts else ""
    return (
        f"sparsity {target.sparsity} leaves {total} nonzeros for {least} weights{why}; expected {least} "
        f"(one per weight) to {most} (all of them). Change the sparsity, force or exclude fewer weights, "
        "or set keep_dense_counts=False."
    )
