"""GraSP: keep what the flow of gradients would miss most."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxsparse.errors import PlanError
from fxsparse.scores import Scoring, register_saliency


@register_saliency
def grasp(scoring: Scoring, temperature: float = 200.0) -> dict[str, Tensor]:
    """``-w * (H g)``, g the gradient and H the Hessian of the loss summed over the batches: Wang et al. 2020,
    arXiv:2002.07376, section 4; the largest are kept.

    The model's output is divided by `temperature` before the loss, as in the paper; the weights that are scored are
    the model's own, where the authors' code draws those of linear layers anew.  Attention runs by its plain formula,
    which has a second derivative.

    Raises:
        PlanError: the model returns anything but a tensor, or `temperature` is not above 0.
    """
    if not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise PlanError(f"saliency 'grasp': expected a temperature above 0, got {temperature!r}.")

    def cool(module: nn.Module, args: Any, output: Any) -> Tensor:
        del module, args
        if not isinstance(output, Tensor):
            raise PlanError(
                f"saliency 'grasp' divides the model's output by {temperature}: expected a tensor, got "
                f"{type(output).__name__}. Score a module that returns the logits alone."
            )
        return output / temperature

    handle = scoring.model.register_forward_hook(cool)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            product = _hessian_times_gradient(scoring)
    finally:
        handle.remove()
    return {name: -weight.detach() * product[name] for name, weight in scoring.weights().items()}


def _hessian_times_gradient(scoring: Scoring) -> dict[str, Tensor]:
    """{weight: H g}: the gradient of <g, gradient of the loss>, g held fixed."""
    flow = scoring.gradients()
    weights = scoring.weights()
    total = {name: torch.zeros_like(part) for name, part in flow.items()}
    for batch in scoring.batches:
        first = torch.autograd.grad(
            scoring.loss_on(batch), list(weights.values()), create_graph=True, allow_unused=True
        )
        pairs = [(g * flow[name]).sum() for name, g in zip(weights, first, strict=True) if g is not None]
        if not pairs or not (along := torch.stack(pairs).sum()).requires_grad:
            continue  # a loss that is linear in the weights has H = 0
        second = torch.autograd.grad(along, list(weights.values()), allow_unused=True)
        for name, part in zip(weights, second, strict=True):
            if part is not None:
                total[name] += part
    return total
