"""GSE's update rule: draw a few inactive entries, and grow the best of them by their gradient.

Nothing here has the size of the weight: a draw takes time and memory for the layer's inputs, outputs and samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from fxsparse.errors import NumericsError
from fxsparse.method import Probe, Proposal, WeightView
from fxsparse.rng import integers
from fxsparse.selection import MaskChange, ascending, union
from fxsparse.topk import top_mask

PRIME = 2**31 - 1
"""Of the hash: the largest with which int64 can multiply two residues."""


@dataclass(frozen=True)
class SampleAndGrow:
    """Algorithm 2 of Heddes et al. 2024, arXiv:2401.06898.

    Of the pairs drawn (with replacement, ``ceil(gamma * |A|)`` of them) those that are distinct and not active are
    the candidates S.  The ``k = min(ceil(drop_fraction * |A|), |S|)`` with the largest gradients are grown, and the k
    active entries of least magnitude pruned.  Neither can undo the other, and |A| stays as it is.
    """

    gamma: float = 1.0
    sampling: str = "uniform"
    """A key of `SAMPLINGS`."""

    @property
    def candidates(self) -> float:
        return self.gamma

    @property
    def probe(self) -> Probe:
        return Probe.SAMPLED if self.sampling == "uniform" else Probe.GUIDED

    def __call__(self, view: WeightView) -> Tensor:
        return exchange([self.propose(view)], view.drop_fraction)[0]

    def propose(self, view: WeightView) -> Proposal:
        """The active entries by their magnitude, and the candidates by that of their gradient."""
        drawn = SAMPLINGS[self.sampling](view, up(self.gamma * len(view.active)))
        candidates = inactive(drawn.to(view.active.device), view.active)
        gradient = view.gradient_at(candidates).detach().abs()
        return Proposal(view.name, view.active, view.values.detach().abs(), candidates, gradient)


@dataclass(frozen=True)
class SampleAndGrowJointly:
    """The same with growth and pruning ranked over all weights at once, as the authors' code does by default.

    Entries move to the layers with the largest gradients; a layer that has lost all of its own gets none back.
    """

    each: SampleAndGrow

    @property
    def candidates(self) -> float:
        return self.each.candidates

    @property
    def probe(self) -> Probe:
        return self.each.probe

    def __call__(self, view: WeightView) -> Tensor:
        return self.each(view)

    def propose(self, view: WeightView) -> Proposal:
        return self.each.propose(view)

    def choose(self, proposals: Sequence[Proposal], drop_fraction: float) -> list[Tensor]:
        return exchange(proposals, drop_fraction)


def exchange(proposals: Sequence[Proposal], drop_fraction: float) -> list[Tensor]:
    """For each proposal the positions after the k worst of all active entries gave way to the k best candidates."""
    if not proposals:
        return []
    active = [len(proposal.active) for proposal in proposals]
    candidates = [len(proposal.candidates) for proposal in proposals]
    count = min(up(drop_fraction * sum(active)), sum(candidates))
    pruned = top_mask(-_joined([proposal.keep for proposal in proposals]), count).split(active)
    grown = top_mask(_joined([proposal.grow for proposal in proposals]), count).split(candidates)
    return [
        _replaced(proposal, lost.to(proposal.active.device), won.to(proposal.active.device))
        for proposal, lost, won in zip(proposals, pruned, grown, strict=True)
    ]


def _replaced(proposal: Proposal, lost: Tensor, won: Tensor) -> Tensor:
    return union(proposal.active[~lost], proposal.candidates[won])


def _joined(scores: Sequence[Tensor]) -> Tensor:
    return torch.cat([score.to(scores[0].device) for score in scores])


def inactive(drawn: Tensor, active: Tensor) -> Tensor:
    """The distinct positions among `drawn` that are not in `active` (ascending): int64, ascending."""
    return MaskChange.between(active, ascending(drawn).unique_consecutive()).grown


def up(number: float) -> int:
    """The next integer, where 0.1 * 30 is 3 and not 3.0000000000000004."""
    return ceil(round(number, 9))


def uniform(view: WeightView, count: int) -> Tensor:
    """Every pair is as likely as any other."""
    return integers(prod(view.shape), count, view.generator, view.active.device)


def grabo(view: WeightView, count: int) -> Tensor:
    """An input by its |h|_1 over the batch, an output by its |delta|_1: equations 1 to 3.

    Their product bounds the gradient's magnitude, and equals it for a batch of one.
    """
    return _draw(view, view.marginals(None), count)


def graest(view: WeightView, count: int) -> Tensor:
    """An input by |h s| and an output by |delta s|, with the same random signs s: equations 4 and 5.

    The product of the two sums is an unbiased estimate of the gradient.  A convolution has a sign for every sample
    and position.
    """
    coefficients = torch.randint(PRIME, (4,), generator=view.generator).tolist()
    return _draw(view, view.marginals(lambda terms: four_wise_signs(terms, coefficients)), count)


SAMPLINGS = {"uniform": uniform, "grabo": grabo, "graest": graest}
"""(view, number) -> so many flat positions, in any order, repeated and active ones among them."""


def four_wise_signs(terms: Tensor, coefficients: Sequence[int]) -> Tensor:
    """+1 or -1 for each of `terms` (int64, from 0 to PRIME - 1), any four of them independent; float64.

    The sign is the hash's lowest bit, and a prime is odd: the mean of a sign is 1 / PRIME in place of 0.
    """
    return (1 - 2 * (polynomial_hash(terms, coefficients, PRIME) & 1)).double()


def polynomial_hash(terms: Tensor, coefficients: Sequence[int], prime: int) -> Tensor:
    """The polynomial with these coefficients at `terms`, modulo `prime`: with four random ones, four-wise independent
    (Wegman and Carter 1981).
    """
    result = torch.zeros_like(terms)
    for coefficient in coefficients:
        result = (result * terms + coefficient) % prime
    return result


def _draw(view: WeightView, sums: tuple[Tensor, Tensor] | None, count: int) -> Tensor:
    """Pairs of an input and an output, each drawn in proportion to its sum; uniform ones where nothing was seen."""
    if sums is None:
        return uniform(view, count)
    columns, rows = (_weights(part.cpu(), view.name) for part in (sums[0], sums[1].unsqueeze(0)))
    chosen = _pick(rows, torch.zeros(count, dtype=torch.int64), view.generator)
    group = chosen // (view.shape[0] // len(columns))
    return chosen * columns.shape[1] + _pick(columns, group, view.generator)


def _weights(sums: Tensor, name: str) -> Tensor:
    """Magnitudes in fp64, [groups, n]; ones for a group that is all 0, such as a layer of dead neurons."""
    weights = sums.double().abs()
    if not bool(weights.isfinite().all()):
        raise NumericsError(
            f"{name!r}: expected finite inputs and output gradients to sample by, got inf or NaN. The weights or "
            "gradients have diverged: look at the loss and the learning rate before this step."
        )
    return torch.where(weights.sum(1, keepdim=True) > 0, weights, 1)


def _pick(weights: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
    """One index into ``weights[g]`` for every g of `group`, with probability in proportion to it."""
    size = weights.shape[1]
    ends = weights.flatten().cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[size - 1 :: size]])
    at = starts[group] + torch.rand(len(group), generator=generator, dtype=ends.dtype) * weights.sum(1)[group]
    last = size - 1 - (weights > 0).flip(1).int().argmax(1)  # rounding may carry `at` to the end of its group
    return torch.minimum(torch.searchsorted(ends, at, right=True) - group * size, last[group]).clamp(min=0)
