"""How a budget of nonzeros is shared among weights: ``(specs, target) -> {weight name: nnz}``, one policy a file."""

from fxsparse.allocation.policies import POLICIES, check, resolve
from fxsparse.allocation.target import Target

__all__ = ["POLICIES", "Target", "check", "resolve"]
