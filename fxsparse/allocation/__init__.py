"""How weights share a budget of nonzeros: ``(specs, target) -> {weight name: nnz}``, one policy a file."""

from fxsparse.allocation.global_magnitude import by_magnitude_per_cost
from fxsparse.allocation.policies import POLICIES, check, resolve, target_densities
from fxsparse.allocation.published import published
from fxsparse.allocation.target import Target

__all__ = ["POLICIES", "Target", "by_magnitude_per_cost", "check", "published", "resolve", "target_densities"]
