"""Static sparsity: the baseline whose mask never moves."""

from fxsparse.method import Method, register
from fxsparse.reparam import HardMask
from fxsparse.scores import score_named


@register
def static(score: str = "random") -> Method:
    """A fixed mask, drawn at random or by magnitude: "Static" in Evci et al. 2020, arXiv:1911.11134.

    `score`: a name in ``fxsparse.scores.SCORES``.
    """
    return Method("static", HardMask(), score_named(score), source="arXiv:1911.11134")
