"""HyperSparse: dense training under a penalty that sorts weights into large and small ones, then one global cut."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Choice, Held, Method, Probe, WeightView, register
from fxsparse.options import check_number, check_steps
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask
from fxsparse.rules import LargestOfAll
from fxsparse.schedule import Levels, Schedule
from fxsparse.scores import score_named

BEND = 0.6585
"""atanh(1 / sqrt 3): where the slope of tanh falls steepest."""


@dataclass(frozen=True)
class CutAndForget:
    """Keep the largest magnitudes of all weights together, and let the optimizer's state start anew."""

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Choice]:
        return [replace(choice, forget=True) for choice in LargestOfAll().choose_all(views, total)]


@dataclass(frozen=True)
class Sorting:
    """``sign(w) (sum |w| / sum tanh(s |w|)) s sech^2(s |w|)`` times a weight that grows by `growth` every `epoch`.

    The sums are over all weights that are to be pruned, s is `BEND` over the smallest magnitude that the cut would
    keep, so that what is smaller is pulled to 0 and what is larger is let alone.  The equation's value is always 0.
    """

    strength: float
    growth: float
    epoch: int
    start: int
    cut: int

    def __call__(self, weights: Sequence[Held], step: int) -> list[dict[str, Tensor]]:
        if not self.start <= step < self.cut:
            return [{} for _ in weights]
        sorted_ = [held for held in weights if held.final < held.weight.numel()]
        factor = self.strength * self.growth ** ((step - self.start) // self.epoch)
        gradients = hypersparse_gradient([held.weight for held in sorted_], sum(h.final for h in sorted_))
        of = {held.name: factor * gradient for held, gradient in zip(sorted_, gradients, strict=True)}
        return [{"weight": of[held.name]} if held.name in of else {} for held in weights]


def hypersparse_gradient(weights: Sequence[Tensor], kept: int) -> list[Tensor]:
    """For every weight the gradient of the penalty, in its dtype, where `kept` entries of all are to stay."""
    if not weights or not kept:
        return [torch.zeros_like(weight) for weight in weights]
    sizes = torch.cat([weight.detach().abs().flatten().float() for weight in weights])
    smallest = sizes.kthvalue(len(sizes) - kept + 1).values
    s = torch.where(smallest > 0, BEND / smallest, 0)  # 0: there are as few others already
    ratio = sizes.double().sum() / torch.tanh(s * sizes).double().sum()
    factor = torch.where(smallest > 0, ratio * s, 0).float()
    return [
        (weight.sign() * factor * (1 - torch.tanh(s * weight.abs().float()).square())).to(weight.dtype)
        for weight in weights
    ]


@register
def hypersparse(
    cut: int = 62_560,
    start: int = 23_460,
    epoch: int = 391,
    strength: float = 5e-6,
    growth: float = 1.05,
) -> Method:
    """Train dense, then under a growing penalty (ART), then cut once and go on sparse: Glandorf et al. 2023,
    arXiv:2308.07163.

    Steps below `start` (60 epochs of CIFAR at batch 128) are dense training; from there to `cut` the penalty's gradient
    is added with weight ``strength growth^epochs``, `epoch` steps each.  The cut follows the optimizer's step at `cut`:
    the largest magnitudes of all weights together stay, exactly as many as the plan says, and the optimizer's state
    starts anew.  The paper cuts where the pruned copy's training accuracy passes the dense model's, which takes
    evaluations: here it is a fixed step, and 100 epochs of ART are our choice.  It then trains 160 epochs at a learning
    rate of 0.1 again, which is yours to set.  The strength is that of the authors' code; its README has 5e-4.
    """
    check_number("strength", strength, 0)
    check_number("growth", growth, 1)
    check_steps("start", start, 0)
    check_steps("epoch", epoch, 1)
    check_steps("cut", cut, 1)
    if cut <= start:
        raise PlanError(f"expected the cut after the start of the penalty, got {cut} and {start}.")
    return Method(
        name="hypersparse",
        reparam=HardMask(),
        init=score_named("magnitude"),
        rule=CutAndForget(),
        schedule=Schedule(1, cut + 1, ramp=Levels(((0, 0.0), (cut, None))), at=(cut,)),
        source="arXiv:2308.07163",
        pattern=Unstructured(),
        penalty=Sorting(float(strength), float(growth), epoch, start, cut),
    )
