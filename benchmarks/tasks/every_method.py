"""Every method of fxsparse in one recipe: its schedule scaled from the paper's training to a task's number of steps.

The rule, the same for all tasks, and tuned for STR alone:

- Methods that exchange entries do it every 20 steps (of 300 or more), and their masks rest for the last quarter.
  Top-KAST takes its sets anew at every step, to the end.
- Ramps, phases and penalties take the share of training that they have in the paper.
- Where scores are learned, learning rate x steps is the paper's, and so is Spartan's sharpness x how far AdamW can take
  a weight; a method's other numbers are its defaults.
- STR and soft movement have no target.  STR's decay alone would take its threshold to ``0.63 / sqrt(share kept)``
  times the bound of the initial weights, chosen after a few trials on one seed; soft movement's strength goes
  by the share that is pruned.  Their rows say what came out.
- 2:4 methods have 50 % of zeros, and are shown so.
- One-shot methods prune what was trained dense, with the dense learning rate, and nothing is trained after it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsparse import Plan
from fxsparse.errors import PatternError
from fxsparse.method import from_dict
from fxsparse.methods import METHODS
from fxsparse.pattern import NM, Pattern
from fxsparse.transposable import Transposable

MAGNITUDE = "magnitude, one-shot"
ONE_SHOT = (MAGNITUDE, "wanda", "sparsegpt")
"""Rows that prune a dense model after training."""
PATTERNS: dict[str, Pattern] = {
    "s_ste": NM(2, 4),
    "sr_ste 2:4": NM(2, 4),
    "sr_ste 2:4 transposable": Transposable(),
}
"""Rows with a pattern that decides the sparsity."""
SPARSITY_OF_PATTERNS = 0.5
NAMES = {MAGNITUDE: "static", "sr_ste 2:4": "sr_ste", "sr_ste 2:4 transposable": "sr_ste"}
"""Methods of the rows that are not called after theirs."""
ROWS = (*(method.__name__.rstrip("_") for method in METHODS), *NAMES)


@dataclass(frozen=True)
class Recipe:
    """What schedules are scaled to."""

    steps: int
    rate: float
    """Peak learning rate."""
    sparsity: float
    bound: float
    """Of initial weights that are uniform: ``1 / sqrt(fan-in)``, a mean over the entries of the model's weights."""

    @property
    def every(self) -> int:
        """Steps from update to update."""
        return max(1, min(20, self.steps // 15))

    @property
    def stop(self) -> int:
        """Where masks come to rest, on an update."""
        return self.on_update(0.75)

    def on_update(self, share: float) -> int:
        """The last update up to a share of training; at least the first."""
        return max(self.every, int(share * self.steps) // self.every * self.every)

    def score_lr(self, of_paper: float) -> float:
        """Multiple of the learning rate at which rate x steps is as in the paper."""
        return of_paper / (self.rate * self.steps)


def recipe_of(model: nn.Module, steps: int, rate: float, sparsity: float) -> Recipe:
    """A model's recipe."""
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    bound = sum(weight.numel() * weight[0].numel() ** -0.5 for weight in weights) / total
    return Recipe(steps, rate, sparsity, bound)


def options_of(row: str, recipe: Recipe) -> dict[str, Any]:
    """Options of the row's method in this recipe: plain values."""
    return _OPTIONS.get(NAMES.get(row, row) if row != MAGNITUDE else row, _none)(recipe)


def plan_of(row: str, recipe: Recipe, seed: int, model: nn.Module) -> Plan:
    """Masked storage and ERK for all, over all weights together where the method ranks them so.

    Weights of `model` whose shapes a row's pattern cannot have stay dense.
    """
    method = from_dict({"name": NAMES.get(row, row), **options_of(row, recipe)})
    pattern = PATTERNS.get(row)
    allocation = "erk" if pattern is None else "uniform"
    return Plan(
        sparsity=recipe.sparsity,
        method=method,
        pattern=pattern or method.pattern,  # pyright: ignore[reportArgumentType]  # Plan's own default is None
        exclude=_unfit(model, pattern) if pattern else (),
        allocation=allocation,
        storage="masked",
        seed=seed,
    )


def _unfit(model: nn.Module, pattern: Pattern) -> tuple[str, ...]:
    found: list[str] = []
    for name, weight in model.named_parameters():
        try:
            if weight.dim() > 1:
                pattern.feasible(tuple(weight.shape), weight.numel())
        except PatternError:
            found.append(name)
    return tuple(found)


def _none(_: Recipe) -> dict[str, Any]:
    return {}


def _moves(recipe: Recipe) -> dict[str, Any]:
    return {"every": recipe.every, "stop": recipe.stop}


def _steps(recipe: Recipe) -> dict[str, Any]:
    return {"steps": recipe.steps}


def _top_kast(_: Recipe) -> dict[str, Any]:
    """Sets chosen anew at every step, to the end; the paper's every 100th is one of 32,000."""
    return {"every": 1}


def _spartan(recipe: Recipe) -> dict[str, Any]:
    """The paper's 20 of ViT-B/16, whose weights AdamW's decay of 0.3 bounds at 1 / 0.3, for the bound of these.

    Half of rate x steps is as far as AdamW takes a weight under the one-cycle rate.
    """
    return {"steps": recipe.steps, "beta": 20 / 0.3 / (recipe.rate * recipe.steps / 2)}


def _gmp(recipe: Recipe) -> dict[str, Any]:
    return {"every": recipe.every, "start": recipe.on_update(10 / 32), "stop": recipe.stop}


def _granet(recipe: Recipe) -> dict[str, Any]:
    return {**_moves(recipe), "ramp": recipe.on_update(0.75 * 43 / 62.5)}


def _mest(recipe: Recipe) -> dict[str, Any]:
    return {"every": recipe.every, "steps": recipe.steps}


def _cht(recipe: Recipe) -> dict[str, Any]:
    return {"every": recipe.every, "steps": recipe.stop, "decay": "cosine"}


def _chase(recipe: Recipe) -> dict[str, Any]:
    channels = {"channel_every": recipe.every, "channel_stop": recipe.on_update(0.75 * 130 / 160)}
    return {**_moves(recipe), **channels}


def _mst(recipe: Recipe) -> dict[str, Any]:
    """The phases' shares of GPT-2's 600,000 steps; the ultra-sparse one halves what the plan leaves."""
    first, second = recipe.every, max(2 * recipe.every, recipe.on_update(0.1))
    levels = {"levels": [0.5, (1 + recipe.sparsity) / 2], "at": [first, second]}
    return {**_moves(recipe), **levels, "restore": recipe.on_update(0.75 * 0.8)}


def _hypersparse(recipe: Recipe) -> dict[str, Any]:
    """60 epochs dense, 100 under the penalty, 160 after the cut."""
    shares = {"start": recipe.steps * 60 // 320, "cut": recipe.steps // 2}
    return {**shares, "epoch": max(1, round(recipe.steps / 320))}


def _movement(recipe: Recipe) -> dict[str, Any]:
    """A tenth of warm-up, a fifth of cool-down; scores at 1e-2 for 54,000 steps."""
    shares = {"warmup": recipe.steps // 10, "cooldown": recipe.steps // 5}
    return {"steps": recipe.steps, **shares, "score_lr": recipe.score_lr(540.0)}


def _soft_movement(recipe: Recipe) -> dict[str, Any]:
    return {**_movement(recipe), "strength": 400 * recipe.sparsity / 0.9}


def _str(recipe: Recipe) -> dict[str, Any]:
    """Half of rate x steps is the integral of the one-cycle rate."""
    share = min(0.63 / math.sqrt(1 - recipe.sparsity) * recipe.bound, 0.45)
    start, end = -10.0, math.log(share / (1 - share))
    return {"initial": start, "weight_decay": math.log(start / end) / (recipe.rate * recipe.steps / 2)}


_OPTIONS: dict[str, Callable[[Recipe], dict[str, Any]]] = {
    MAGNITUDE: lambda _: {"score": "magnitude"},
    **dict.fromkeys(("set", "rigl", "srigl", "gse", "snfs", "dsr"), _moves),
    **dict.fromkeys(("dual_averaging", "imp", "acdc", "feather"), _steps),
    "top_kast": _top_kast,
    "spartan": _spartan,
    "gmp": _gmp,
    "granet": _granet,
    "mest": _mest,
    "cht": _cht,
    "chase": _chase,
    "mst": _mst,
    "hypersparse": _hypersparse,
    "movement": _movement,
    "soft_movement": _soft_movement,
    "str": _str,
}
"""Methods without an entry keep their defaults: static, sr_ste, s_ste, wanda, sparsegpt, dtp, supermask."""
