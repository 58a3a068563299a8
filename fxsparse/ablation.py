"""SRigL's update rule: ablate the neurons that hold too few salient weights, and share their budget among the rest."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fxsparse.method import Probe, WeightView
from fxsparse.pattern import row_tiles
from fxsparse.rules import GradientMagnitude, Tiles, put
from fxsparse.topk import top_mask, top_of_tiles


@dataclass(frozen=True)
class AblateAndGrow:
    """Constant fan-in with dynamic ablation: Lasby et al. 2023, arXiv:2305.02299.

    Of n active entries, ``int(n * drop_fraction)`` are to go.  An entry is salient if its weight is among the
    largest that stay, or its gradient among as many of the largest as are to go.  A neuron with fewer salient
    entries than the threshold is ablated; it comes back at a later update where its gradients make it salient
    again.  The fan-in becomes ``budget // neurons left``; what is kept of the layer's largest weights is trimmed
    to it, and every neuron grows up to it by its own largest gradients.

    The paper calls as many weights as are to go salient on both counts, so that none would be as the drop
    fraction decays to 0; the authors' code counts all weights that stay, and so does this.
    """

    gamma_sal: float = 0.3
    """Share of the initial fan-in that a neuron has to hold in salient entries; from 1 on, their number."""
    authors_code: bool = False
    """As the authors' code computes it: active entries may be salient by their gradient too, a neuron above the
    fan-in keeps any of its weights (seeded) in place of the largest, and where ablation leaves too few weights
    to keep, pruned zeros are kept in their place."""

    probe = Probe.DENSE

    def __call__(self, view: WeightView) -> Tensor:
        keep = len(view.active) - int(len(view.active) * view.drop_fraction)
        if self.authors_code:
            keep = min(keep, int(view.values.count_nonzero()))
        alive = self._alive(view, keep)
        fan_in = srigl_fan_in(view.budget, int(alive.sum()), prod(view.shape[1:]))
        return _grown(view, alive, self._kept(view, alive, keep, fan_in), fan_in)

    def _alive(self, view: WeightView, keep: int) -> Tensor:
        """Bool [neurons]: those that are not ablated."""
        neurons, columns = view.shape[0], prod(view.shape[1:])
        # Fewer neurons than one more than these could not hold the budget.
        least = view.budget // columns
        if not view.ablates or least >= neurons:
            return torch.ones(neurons, dtype=torch.bool, device=view.active.device)
        threshold = salience_threshold(self.gamma_sal, srigl_fan_in(view.budget, neurons, columns))
        return salient_enough(self._salient(view, keep), threshold, least)

    def _salient(self, view: WeightView, keep: int) -> Tensor:
        """Salient entries of every neuron, int64 [neurons]."""
        columns = prod(view.shape[1:])
        tiles = GradientMagnitude().tiles(view)
        if not self.authors_code:
            tiles = put(-torch.inf, view.active, tiles, columns)
        heavy = view.active[top_mask(view.values.abs(), keep)]
        steep = top_of_tiles(_flat(tiles, columns), len(view.active) - keep)
        salient = torch.cat([heavy, steep.to(heavy.device)]).unique()
        return torch.bincount(salient // columns, minlength=view.shape[0])

    def _kept(self, view: WeightView, alive: Tensor, keep: int, fan_in: int) -> Tensor:
        """Positions of the layer's largest weights in neurons that are left, at most `fan_in` in each."""
        columns = prod(view.shape[1:])
        if self.authors_code:
            kept = top_of_tiles(_flat(_magnitudes(view, alive), columns), keep)
            return trim(kept, torch.rand(len(kept), generator=view.generator), columns, fan_in)
        score = view.values.abs().masked_fill(~alive[view.active // columns], -torch.inf)
        chosen = top_mask(score, keep)
        return trim(view.active[chosen], score[chosen], columns, fan_in)


def srigl_fan_in(budget: int, active: int, in_features: int) -> int:
    """Fan-in of each of `active` neurons that share a budget of nonzeros: ``budget // active``, at most all inputs."""
    return min(budget // active, in_features)


def salience_threshold(gamma_sal: float, fan_in: int) -> int:
    """Salient entries that a neuron needs; `fan_in` is that without any ablation."""
    return int(gamma_sal) if gamma_sal >= 1 else max(1, int(gamma_sal * fan_in))


def salient_enough(salient: Tensor, threshold: int, least: int) -> Tensor:
    """Bool [neurons]: at least `threshold` salient entries, or as many as so lets more than `least` neurons stay."""
    feasible = int(salient.sort(descending=True).values[least])
    return salient >= min(threshold, feasible)


def trim(kept: Tensor, score: Tensor, columns: int, fan_in: int) -> Tensor:
    """The positions `kept` (ascending) without those above the `fan_in` largest scores of each neuron."""
    neurons = kept // columns
    counts = torch.bincount(neurons)
    if not len(kept) or int(counts.max()) <= fan_in:
        return kept
    order = score.to(kept.device).argsort(descending=True, stable=True)
    order = order[neurons[order].argsort(stable=True)]
    first = (counts.cumsum(0) - counts)[neurons[order]]
    rank = torch.arange(len(kept), device=kept.device) - first
    return kept[order[rank < fan_in]].sort().values


def _grown(view: WeightView, alive: Tensor, kept: Tensor, fan_in: int) -> Tensor:
    """The kept positions and, up to `fan_in` in every neuron that is left, those of its largest gradients."""
    columns = prod(view.shape[1:])
    parts = []
    for first, scores in put(torch.inf, kept, GradientMagnitude().tiles(view), columns):
        neurons = alive[first : first + len(scores)].nonzero().squeeze(1)
        row, column = top_mask(scores[neurons], fan_in, dim=1).nonzero(as_tuple=True)
        parts.append((neurons[row] + first) * columns + column)
    return torch.cat(parts)


def _magnitudes(view: WeightView, alive: Tensor) -> Tiles:
    """The weight's magnitudes in row tiles: 0 where pruned, -inf in ablated neurons."""
    columns = prod(view.shape[1:])
    neurons = view.active // columns
    for first, rows in row_tiles(view.shape):
        inside = (neurons >= first) & (neurons < first + rows)
        tile = view.values.new_zeros(rows, columns)
        tile.view(-1)[view.active[inside] - first * columns] = view.values[inside].abs()
        tile[~alive[first : first + rows]] = -torch.inf
        yield first, tile


def _flat(tiles: Tiles, columns: int) -> Tiles:
    """Tiles by their first flat position in place of their first row."""
    return ((first * columns, tile) for first, tile in tiles)
