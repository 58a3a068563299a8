"""CHT and CHTs: Cannistraci-Hebb training, which grows links by the network's topology alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.link_prediction import cht_scores, whole_chains
from fxsparse.method import Method, Probe, WeightView, register
from fxsparse.options import check_flag, check_integer, check_one_of, check_steps
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask
from fxsparse.schedule import Schedule, decay_curve
from fxsparse.scores import score_named
from fxsparse.selection import to_mask
from fxsparse.topk import top_positions

LARGEST = 8_192
"""Rows and columns up to which scores are computed: three products of n x n matrices, and as much memory."""
_LEAST = 1e-30
"""What a link without any path counts: it is drawn where nothing else is left."""


@dataclass(frozen=True)
class RemoveAndPredict:
    """Drop ``int(nnz drop_fraction)`` links by magnitude, remove broken chains, grow to nnz by `cht_scores`.

    `soft` keeps links drawn without replacement with weights ``|w|^T``, T from 1 to 3 over `steps`, and grows those
    drawn with the scores as weights; otherwise the largest of both.  A link that was dropped in this very update may be
    grown again, and then keeps its value.  A chain is broken at a neuron between two linear layers that has no link
    in or none out: its other links go as well, and so on.  Where no path leads anywhere growth is uniform.
    """

    kind: str
    soft: bool
    steps: int
    own_counts: ClassVar[bool] = True

    probe = Probe.TOPOLOGY

    def __call__(self, view: WeightView) -> Tensor:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Tensor]:
        del total
        kept = {view.name: to_mask(self._kept(view), (view.shape[0], prod(view.shape[1:]))) for view in views}
        pairs = [(view.name, fed) for view in views for fed in view.feeds if fed in kept]
        # Links that nothing would be left of have no topology to grow by, and stay.
        kept |= {name: mask for name, mask in whole_chains(kept, pairs).items() if bool(mask.any())}
        return [self._grown(view, kept[view.name]) for view in views]

    def _kept(self, view: WeightView) -> Tensor:
        size = view.values.detach().abs().float()
        if self.soft:
            power = 1 + 2 * min(view.step / self.steps, 1)
            size = power * size.log() + _gumbel(size, view.generator)
            size = size.clamp_min(torch.finfo(size.dtype).min)
        return view.active[top_positions(size, len(view.active) - int(view.drop_fraction * view.nnz))]

    def _grown(self, view: WeightView, links: Tensor) -> Tensor:
        if max(links.shape) > LARGEST:
            raise PlanError(
                f"{view.name}: cht scores all pairs of neurons and takes matrices up to {LARGEST} x {LARGEST}, got "
                f"{links.shape[0]} x {links.shape[1]}. Exclude the weight, or choose another method."
            )
        score = cht_scores(links, self.kind)
        noise = _gumbel(score, view.generator)
        score = (
            score.clamp_min(_LEAST).log() + noise if self.soft else score.where(score > 0, -1 / noise.exp())
        )
        return top_positions(score.masked_fill(links, torch.inf), view.nnz)


def _gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    """Noise whose largest sums with log-weights are a draw without replacement."""
    drawn = torch.rand(like.shape, generator=generator).clamp(1e-7, 1 - 1e-7)
    return -(-drawn.log()).log().to(like.device)


@register
def cht(
    every: int = 391,
    steps: int = 39_100,
    drop_fraction: float = 0.3,
    decay: str = "cosine",
    soft: bool = True,
    score: str = "ch3",
    init: str = "random",
) -> Method:
    """Prune by magnitude and grow links that paths of length 3 predict, without any gradient: Zhang et al. 2024-25,
    arXiv:2501.19107 (CHTs; with ``soft=False`` CHT).

    Updates follow the optimizer's step at the end of every epoch, of `every` steps, below `steps`, the end of training.
    The share that goes, `drop_fraction` at first, falls to 0 along a cosine (``--adaptive_zeta`` in the authors'
    commands for CHTs); `decay` may also be "constant", with which draws drop large weights to the end, "linear" or
    "cubic".
    `score` is "ch3" or "ch2", in the node form.  Where a weight feeds another alone, links of neurons that lost all
    links on one side go too, and are grown elsewhere; every weight keeps its count.  Weights of convolutions are taken
    as [out, fan-in], which is our reading.  Scores are dense and take O(n^3): a weight above 8,192 rows or columns is
    refused.  The density decay of CHTss, EM_S and the authors' initial weights are left out.
    """
    check_one_of("score", score, ("ch3", "ch2"))
    check_integer("every", every, 1)
    check_steps("steps", steps, every)
    check_flag("soft", soft)
    return Method(
        name="cht",
        reparam=HardMask(),
        init=score_named(init),
        rule=RemoveAndPredict(score, soft, steps),
        schedule=Schedule(every, steps, every, drop_fraction=decay_curve(decay, drop_fraction, steps)),
        source="arXiv:2501.19107",
        pattern=Unstructured(),
    )
