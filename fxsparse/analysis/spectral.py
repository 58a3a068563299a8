"""How good an expander a mask is: Ramanujan gap, weighted spectral gap, their means over degrees, and all of them.

A mask [outputs, inputs, *kernel] is the bipartite graph of its matrix [outputs, inputs * kernel].  Its adjacency has
the eigenvalues plus and minus its singular values, so that the two largest of those say how fast signals mix.  Formulas
as in Hoang et al., ICLR 2023 and NeurIPS 2023, which Sparse-IFT (arXiv:2303.11525) cites.  Compare at equal sparsity
only: every quantity grows with the number of entries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from fxsparse.analysis.bipartite import Bipartite, check_mask, one_thread

MIN_DEGREE = 3
"""Mean degree of either side below which a graph has no gaps: nearly a tree, it cannot be an expander."""
MIN_CLASS = 3
"""Inputs of one degree that make a class.  That degree is at least `MIN_DEGREE`, and some output has two of them."""


@dataclass(frozen=True)
class Spectral:
    """One mask as a graph.  What is not known is None, and `skipped` says why."""

    shape: tuple[int, int]
    """(outputs, inputs) of the matrix; for a convolution inputs are those of all kernel positions."""
    nnz: int
    nodes: tuple[int, int]
    """(outputs, inputs) that have an entry; the others are left out."""
    input_degree: float
    """Mean entries of such an input, d_l."""
    output_degree: float
    """Mean entries of such an output, d_r."""
    sigma_1: float
    sigma_2: float
    """The largest and the second largest singular value of the mask."""
    ramanujan_gap: float | None = None
    """sqrt(d_l - 1) + sqrt(d_r - 1) - sigma_2; a graph where it is not negative is Ramanujan-like."""
    iterative_ramanujan_gap: float | None = None
    """Its mean over the subgraphs of inputs of equal degree (IMDB)."""
    weighted_spectral_gap: float | None = None
    """sigma_1 - sigma_2 of abs(weight * mask)."""
    iterative_weighted_gap: float | None = None
    """Its mean over the same subgraphs (IMSG)."""
    classes: int = 0
    """How many subgraphs the two means are over."""
    skipped: str = ""

    @property
    def full_spectrum_distance(self) -> float | None:
        """The Euclidean norm of the four gaps; None unless all are known."""
        gaps = (self.ramanujan_gap, self.weighted_spectral_gap)
        means = (self.iterative_ramanujan_gap, self.iterative_weighted_gap)
        known = [gap for gap in (*gaps, *means) if gap is not None]
        return math.hypot(*known) if len(known) == 4 else None

    @property
    def random_gap(self) -> float | None:
        """The Ramanujan gap that a random mask of the same nodes and entries has in the limit of large layers.

        Its sigma_2 is sqrt(1 - density) * (sqrt(d_l) + sqrt(d_r)), the edge of the Marchenko-Pastur law.
        """
        if self.ramanujan_gap is None:
            return None
        left, right = self.input_degree, self.output_degree
        edge = math.sqrt(1 - self.nnz / prod(self.nodes)) * (math.sqrt(left) + math.sqrt(right))
        return _bound(left, right) - edge

    @property
    def sigma_gap(self) -> float | None:
        """2 * sqrt(sigma_1 - 1) - sigma_2, an older form of the Ramanujan gap."""
        return None if self.ramanujan_gap is None else 2 * math.sqrt(self.sigma_1 - 1) - self.sigma_2


def spectral(mask: Tensor, weight: Tensor | None = None) -> Spectral:
    """The spectral quantities of a mask [outputs, inputs, ...] of bools, or of numbers that are 0 or 1.

    Those that need weights are None without `weight`, of the same shape; its absolute values are read at the mask's
    entries only.
    Grouped convolutions are taken as their weight is stored, [outputs, inputs / groups, ...].

    Raises:
        PatternError: no such mask, a weight of another shape, or what is no dense tensor with values.
        NumericsError: inf or NaN among the weights.
        UnsupportedError: more than 512 nodes on both sides, and scipy is not installed.
    """
    check_mask(mask, weight)
    columns = prod(mask.shape[1:])
    positions = mask.detach().flatten().nonzero().flatten()
    values = None if weight is None else weight.detach().flatten()[positions]
    graph = Bipartite.of(positions // max(columns, 1), positions % max(columns, 1), values)
    return spectral_of(graph, (len(mask), columns))


def spectral_of(graph: Bipartite, shape: tuple[int, int]) -> Spectral:
    """The same of a graph; `shape` counts its isolated nodes too.  Runs on one thread, whatever torch is set to."""
    with one_thread():
        return _measured(graph, shape)


def _measured(graph: Bipartite, shape: tuple[int, int]) -> Spectral:
    left, right = graph.degrees
    first, second = graph.two_largest()
    measured = (shape, graph.nnz, graph.shape, left, right, first, second)
    reason = _too_sparse(graph)
    if reason:
        return Spectral(*measured, skipped=reason)
    subgraphs = [part for part in graph.degree_classes(MIN_CLASS) if _is_class(part)]
    return Spectral(
        *measured,
        ramanujan_gap=_bound(left, right) - second,
        iterative_ramanujan_gap=_mean([_gap(part) for part in subgraphs]),
        weighted_spectral_gap=_weighted_gap(graph),
        iterative_weighted_gap=_mean([_weighted_gap(part) for part in subgraphs]),
        classes=len(subgraphs),
        skipped="" if subgraphs else f"no {MIN_CLASS} inputs of one degree of at least {MIN_DEGREE}",
    )


def _bound(left: float, right: float) -> float:
    return math.sqrt(left - 1) + math.sqrt(right - 1)


def _gap(graph: Bipartite) -> float:
    return _bound(*graph.degrees) - graph.two_largest()[1]


def _weighted_gap(graph: Bipartite) -> float | None:
    if graph.values is None:
        return None
    first, second = graph.two_largest(weighted=True)
    return first - second


def _mean(gaps: Sequence[float | None]) -> float | None:
    known = [gap for gap in gaps if gap is not None]
    return math.fsum(known) / len(known) if known else None


def _too_sparse(graph: Bipartite) -> str:
    """Why the graph has no gaps, or ""."""
    left, right = graph.degrees
    if not graph.nnz:
        return "no entries"
    if min(left, right) >= MIN_DEGREE:
        return ""
    side, degree = ("inputs", left) if left <= right else ("outputs", right)
    return f"mean degree of the {side} is {degree:.3g}, below {MIN_DEGREE}"


def _is_class(graph: Bipartite) -> bool:
    left, right = graph.degrees
    return left >= MIN_DEGREE and right > 1
