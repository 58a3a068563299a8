"""Soft movement pruning: learned scores against a rising threshold, pushed down by a penalty."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Choice, Extra, Held, Method, Probe, WeightView, register
from fxsparse.methods.movement import check_phases, largest, movement_map
from fxsparse.options import is_number
from fxsparse.pattern import Unstructured
from fxsparse.reparam import ValueMap, Zeros
from fxsparse.schedule import Rising, Schedule
from fxsparse.scores import score_named

LEAST = 0.005
"""Share of every weight that stays whatever its scores are."""


@dataclass(frozen=True)
class AboveRising:
    """Keep what has ``sigmoid(S) > tau``, and at least the best `LEAST` of the weight; equal scores by magnitude."""

    tau: Rising

    probe = Probe.NONE

    def __call__(self, view: WeightView) -> Choice:
        scores = view.extras["scores"]
        mask = torch.sigmoid(scores.double()) > self.tau(view.step)
        least = max(1, int(LEAST * mask.numel()))
        if int(mask.sum()) < least:
            mask = largest(Unstructured(), scores, view.weight().abs(), least)
        return Choice(mask)


@dataclass(frozen=True)
class FewScores:
    """The gradient of ``strength tau_t / tau * mean over weights of mean sigmoid(S)``."""

    strength: float
    tau: Rising

    def __call__(self, weights: Sequence[Held], step: int) -> list[dict[str, Tensor]]:
        share = self.strength * self.tau(step) / self.tau.final / len(weights) if weights else 0.0
        return [{"scores": self._of(held.extras["scores"], share)} for held in weights]

    def _of(self, scores: Tensor, share: float) -> Tensor:
        high = torch.sigmoid(scores)
        return share / scores.numel() * high * (1 - high)


@register
def soft_movement(
    steps: int = 54_000,
    warmup: int = 5_400,
    cooldown: int = 10_800,
    threshold: float = 0.1,
    strength: float = 400.0,
    score_lr: float = 1e-2 / 3e-5,
) -> Method:
    """Keep the entries whose learned score S has ``sigmoid(S) > tau``: Sanh et al. 2020, arXiv:2005.07683, section 4.

    S starts at 0 and learns by ``g w`` as in `movement`; a penalty, the mean of sigmoid(S), pushes it down.  tau rises
    along a cubic from 0 to `threshold`, flat for the first `warmup` and the last `cooldown` of the `steps`, and the
    penalty with it to `strength`.  So `strength` decides how many entries stay, at least 0.5 % of each weight, and the
    plan's sparsity is only what the report compares with.  The scores' learning rate is `score_lr` times that of the
    weights, without weight decay, in ``sparse.parameter_groups(lr, ...)``.  Defaults: SQuAD's 10 epochs at lr 3e-5.
    """
    for name, value, low, high in (
        ("threshold", threshold, 0, 1),
        ("strength", strength, 0, float("inf")),
        ("score_lr", score_lr, 0, float("inf")),
    ):
        if not is_number(value) or not low <= value < high or (name != "strength" and value == 0):
            raise PlanError(
                f"expected {name} as a number above 0 (strength: or 0) and below {high}, got {value!r}."
            )
    check_phases(steps, warmup, cooldown)
    tau = Rising(float(threshold), warmup, steps - cooldown)
    scores = Extra("scores", Zeros(), learned=True, lr=float(score_lr))
    return Method(
        name="soft_movement",
        reparam=ValueMap(movement_map, extras=(scores,)),
        init=score_named("magnitude"),
        rule=AboveRising(tau),
        schedule=Schedule(every=1, start=1),
        source="arXiv:2005.07683",
        pattern=Unstructured(),
        penalty=FewScores(float(strength), tau) if strength else None,
        learned_nnz=True,
    )
