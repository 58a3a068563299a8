"""SNFS: sparse networks from scratch, by sparse momentum."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from fxsparse.method import Method, Probe, WeightView, register
from fxsparse.pattern import Unstructured
from fxsparse.redistribution import shares
from fxsparse.reparam import ValueMap, one_node, with_gradient
from fxsparse.schedule import CosineTo, Schedule
from fxsparse.scores import score_named
from fxsparse.topk import top_positions

DENSE_ENOUGH = 0.2
"""Sparsity below which a weight of more than mean importance drops no larger share than its sparsity."""
ROOM = 0.99
"""Share of a weight's free places that growth may fill while others have room."""


@one_node
def snfs_map(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` where `mask`, else 0; the optimizer gets the whole gradient, and averages it."""
    return with_gradient(torch.where(mask, weight.detach(), 0), (weight, None))


@dataclass(frozen=True)
class SparseMomentum:
    """Each weight drops its ``ceil(r nnz)`` smallest; what was dropped in all is grown again, shared by importance.

    Importance is the mean ``|momentum|`` of a weight's active entries, over the sum of all weights'; grown are the
    largest ``|momentum|`` among what is then inactive, so that an entry which was dropped in this very update may be
    grown again, and then keeps its value.  Counts are by largest remainders and spill over where a weight is full, so
    that the total is exact (the authors' code rounds up, and corrects the drift later).
    """

    probe = Probe.EMA_DENSE

    def __call__(self, view: WeightView) -> Tensor:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Tensor]:
        momenta = [view.momentum().detach().abs().flatten() for view in views]
        importance = importances([m[view.active] for m, view in zip(momenta, views, strict=True)])
        kept = [_kept(view, share > 1 / len(views)) for view, share in zip(views, importance, strict=True)]
        free = [prod(view.shape) - len(positions) for view, positions in zip(views, kept, strict=True)]
        grow = total - sum(map(len, kept))
        most = [int(ROOM * places) for places in free]
        grown = shares(min(grow, sum(most)), importance, most)
        left = [places - count for places, count in zip(free, grown, strict=True)]
        more = shares(grow - sum(grown), importance, left)
        return [
            top_positions(m.index_fill(0, positions, torch.inf), len(positions) + count + last)
            for m, positions, count, last in zip(momenta, kept, grown, more, strict=True)
        ]


def importances(momenta: Sequence[Tensor]) -> list[float]:
    """Of every weight, by ``|momentum|`` of its active entries; 1 in all."""
    means = [float(m.double().mean()) if len(m) else 0.0 for m in momenta]
    whole = sum(means)
    return [mean / whole if whole else 1 / len(means) for mean in means]


def _kept(view: WeightView, important: bool) -> Tensor:
    rate, sparsity = view.drop_fraction, 1 - len(view.active) / prod(view.shape)
    if important and sparsity < DENSE_ENOUGH:
        rate = min(sparsity, rate)
    keep = len(view.active) - min(len(view.active), ceil(rate * len(view.active)))
    return view.active[top_positions(view.values.detach().abs(), keep)]


@register
def snfs(
    every: int = 391,
    stop: int = 97_750,
    drop_fraction: float = 0.5,
    final_drop_fraction: float = 0.005,
    init: str = "random",
) -> Method:
    """Prune by magnitude and grow by the optimizer's momentum, across weights: Dettmers and Zettlemoyer 2019,
    arXiv:1907.04840, Algorithm 1.

    Updates follow the optimizer's step at the end of every epoch, of `every` steps; the share that is dropped falls
    along a cosine to `stop`, the end of training.  Counts of weights drift, and their total stays as the plan has it.
    The momentum is of *dense* gradients, of SGD(momentum=...) or ``exp_avg / (sqrt(exp_avg_sq) + 1e-8)`` of Adam, and
    no update resets it, so that every step costs a dense weight gradient.  All weights start at the same density, at
    random.  The defaults are 250 epochs of CIFAR-10 at batch 128.  (RigL's paper calls a variant without
    redistribution SNFS.)
    """
    return Method(
        name="snfs",
        reparam=ValueMap(snfs_map, exact_zeros=True),
        init=score_named(init),
        rule=SparseMomentum(),
        schedule=Schedule(
            every, stop, every, drop_fraction=CosineTo(drop_fraction, final_drop_fraction, stop)
        ),
        source="arXiv:1907.04840",
        pattern=Unstructured(),
        allocation="uniform",
        keeps_state=True,
    )
