"""Initial values for the active entries of a sparse weight, by name."""

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import WeightInit


def grad_flow(fan_in: Tensor, generator: torch.Generator) -> Tensor:
    """Normal with variance 2 / fan-in, the fan-in being that of each neuron's mask: Evci et al., arXiv:2010.03533."""
    return torch.randn(fan_in.shape, generator=generator) * (2 / fan_in).sqrt()


def grad_flow_srigl(fan_in: Tensor, generator: torch.Generator) -> Tensor:
    """Normal with *standard deviation* 2 / fan-in: what SRigL's code drew for all its published results."""
    return torch.randn(fan_in.shape, generator=generator) * (2 / fan_in)


def unit_variance(fan_in: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on (-1, 1) times sqrt(3 / fan-in): pre-activations of unit variance for such inputs (GSE's code)."""
    return (2 * torch.rand(fan_in.shape, generator=generator) - 1) * (3 / fan_in).sqrt()


WEIGHT_INITS: dict[str, WeightInit | None] = {
    "grad_flow": grad_flow,
    "grad_flow_srigl": grad_flow_srigl,
    "unit_variance": unit_variance,
    "keep": None,
}
"""None leaves the weights as they come."""


def weight_init_named(name: str) -> WeightInit | None:
    """What `WEIGHT_INITS` has under a name; PlanError for another name."""
    if name not in WEIGHT_INITS:
        raise PlanError(f"expected weight_init as one of {', '.join(WEIGHT_INITS)}, got {name!r}.")
    return WEIGHT_INITS[name]
