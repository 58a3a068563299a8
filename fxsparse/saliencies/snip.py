"""SNIP: how much the loss would change if a connection went."""

from torch import Tensor

from fxsparse.scores import Scoring, register_saliency


@register_saliency
def snip(scoring: Scoring) -> dict[str, Tensor]:
    """``|g * w|``, g the gradient of the loss summed over the batches: Lee et al. 2019, arXiv:1810.02340, eq. 4.

    The gradient with respect to a mask that multiplies w, at a mask of ones, is g * w.
    """
    gradients = scoring.gradients()
    return {name: (gradients[name] * weight.detach()).abs() for name, weight in scoring.weights().items()}
