"""FORCE and Iter-SNIP: SNIP in rounds."""

from collections.abc import Mapping

from torch import Tensor

from fxsparse.saliencies.rounds import in_rounds
from fxsparse.scores import Scoring, register_saliency


@register_saliency
def force(scoring: Scoring, rounds: int = 60) -> dict[str, Tensor]:
    """``|g w|``, g the gradient at the pruned net and w the weight as it was: de Jorge et al. 2021, arXiv:2006.09081,
    section 4; what one round drops, a later one may take back.

    Each of the `rounds` (60 in the paper) keeps the largest ``density ** (t / rounds)`` of all entries together, and
    takes a backward of every batch.  For another number register a function that calls this one with it.
    """
    return in_rounds(scoring, rounds, lambda before: _sensitivity(scoring, before), comes_back=True)


@register_saliency
def iter_snip(scoring: Scoring, rounds: int = 60) -> dict[str, Tensor]:
    """`force`, where dropped entries stay out: Iter-SNIP, arXiv:2006.09081, section 4."""
    return in_rounds(scoring, rounds, lambda before: _sensitivity(scoring, before))


def _sensitivity(scoring: Scoring, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gradients = scoring.gradients()
    return {name: (gradients[name] * weight).abs() for name, weight in before.items()}
