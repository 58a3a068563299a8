"""What a plan may spend instead of a sparsity: parameters, FLOPs, bytes, time, or any linear cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from fxsparse.errors import PlanError

KINDS = ("parameters", "flops", "bytes", "latency", "total")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A share, above 0 and up to 1, of what the dense model costs; exactly one kind.

    Args:
        parameters: of the entries of all parameters, those of biases, norms and embeddings too, which stay (Spartan's
            overall sparsity, arXiv:2205.14107).
        flops: of the multiplications and additions of one forward (the convention "mac2"), tokens and pixels counted,
            those of attention and of weights that stay dense too.
        bytes: of all parameters, where a sparse weight is stored as CSR.
        latency: of the time of one forward at the example inputs once the dense model is compiled for inference, from
            the times of this machine's kernels at several densities.
        total: of the cost of all selected weights when dense, at ``cost`` for each entry.
        cost: {glob: cost of an entry} for `total`; 1 for weights that no glob names, the first glob that does decides.

    Raises:
        PlanError: no kind or more than one, a share out of range, or a cost that is not above 0.
    """

    parameters: float | None = None
    flops: float | None = None
    bytes: float | None = None
    latency: float | None = None
    total: float | None = None
    cost: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise PlanError(
                f"Budget: expected exactly one of {', '.join(KINDS)}, got {', '.join(given) or 'none'}."
            )
        if not _is_number(self.share) or not 0 < self.share <= 1:
            raise PlanError(f"Budget({given[0]}=): expected a share of dense in (0, 1], got {self.share!r}.")
        if self.cost is None:
            return
        if self.total is None:
            raise PlanError(f"Budget(cost=) goes with total=, got {given[0]}=, which has costs of its own.")
        if not isinstance(self.cost, Mapping):
            raise PlanError(f"Budget(cost=): expected {{glob: cost of an entry}}, got {self.cost!r}.")
        for glob, cost in self.cost.items():
            if not isinstance(glob, str) or not _is_number(cost) or cost <= 0:
                raise PlanError(
                    f"Budget(cost=): expected {{glob: a number above 0}}, got {glob!r}: {cost!r}."
                )

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def share(self) -> float:
        """The share of dense."""
        return getattr(self, self.kind)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a plan file."""
        row: dict[str, Any] = {self.kind: self.share}
        return row if self.cost is None else row | {"cost": dict(self.cost)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
