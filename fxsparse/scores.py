"""Scores by which an initial mask is chosen, by name."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import PlanError
from fxsparse.method import Score
from fxsparse.pattern import row_tiles


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), fp32: every mask of the pattern is as likely as any other."""
    tiles = [tile for _, tile in random_tiles(weight.shape, generator, weight.device)]
    return torch.cat(tiles).view(weight.shape)


def magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The absolute value."""
    del generator
    return weight.detach().abs()


def random_tiles(
    shape: Sequence[int], generator: torch.Generator, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """`random` in row tiles (first row, [rows, fan_in]) for storage that never holds a whole weight.

    The numbers are drawn on the generator's device, and the tiling depends on `shape` alone.
    """
    for first, rows in row_tiles(shape):
        tile = torch.rand(rows, prod(shape[1:]), generator=generator, device=generator.device)
        yield first, tile.to(device)


@dataclass(frozen=True)
class Given:
    """A score that takes more than the weight: ``compile(..., initial_scores=...)`` hands it in."""

    name: str

    def __call__(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        del weight, generator
        raise PlanError(f"score {self.name!r} is made of a model and its loss; pass it as initial_scores.")


@dataclass
class Scoring:
    """What a saliency may use: a copy of the model that is its own, dropout off, and the loss on some batches."""

    model: nn.Module
    names: tuple[str, ...]
    """Of the weights to be scored."""
    loss: Callable[[nn.Module, Any], Tensor] | None
    batches: Sequence[Any]
    density: float
    """Share of all their entries that is to stay."""
    inputs: Any = None
    """Example inputs, as for `compile`."""

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights to be scored, of the copy."""
        return {name: self.model.get_parameter(name) for name in self.names}

    def gradients(self, batches: Sequence[Any] | None = None) -> dict[str, Tensor]:
        """{weight: gradient of the loss, added up over `batches`, by default all}, in at least fp32.

        Raises:
            PlanError: there is no loss or no batch, the loss is no scalar with a gradient, or none of its gradients
                reaches a weight to be scored.
        """
        chosen = self.batches if batches is None else batches
        if self.loss is None or not chosen:
            raise PlanError(
                "saliency: this score goes by gradients: expected loss_fn(model, batch) and at least one batch, got "
                f"{'no loss_fn' if self.loss is None else 'no batch'}."
            )
        weights = self.weights()
        total = {name: torch.zeros_like(w, dtype=_precise(w)) for name, w in weights.items()}
        reached = False
        for batch in chosen:
            found = torch.autograd.grad(self.loss_on(batch), list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
                    reached = True
        if not reached:
            raise PlanError(
                "saliency: expected a loss_fn(model, batch) that goes by the weights of the model it is given, got one "
                f"whose gradient reaches none of {', '.join(self.names[:3])}. It gets a copy: call that, and not a "
                "model from outside."
            )
        return total

    def loss_on(self, batch: Any) -> Tensor:
        """The loss on one batch; PlanError where that is no scalar with a gradient."""
        assert self.loss is not None
        loss = self.loss(self.model, batch)
        if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() and loss.requires_grad:
            return loss
        got = type(loss).__name__
        if isinstance(loss, Tensor):
            detached = "" if loss.requires_grad else " without a gradient"
            got = f"one of shape {tuple(loss.shape)} and {loss.dtype}{detached}"
        raise PlanError(
            f"saliency: expected loss_fn(model, batch) to return a scalar tensor of floats with a gradient, got {got}. "
            "Compute it from the model that it is given, and reduce it by .mean() or .sum(), without .item(), "
            ".detach() or no_grad."
        )


Saliency = Callable[[Scoring], dict[str, Tensor]]
"""What the entries of every weight are worth before training; larger is kept first."""

SCORES: dict[str, Score] = {"random": random, "magnitude": magnitude, "given": Given("given")}
SALIENCIES: dict[str, Saliency] = {}


def register_saliency(function: Saliency) -> Saliency:
    """Make a score that needs the model and its loss known by its function name, for ``init=`` of every method."""
    name = function.__name__
    known = SALIENCIES.get(name)
    if name in SCORES or (known is not None and known.__module__ != function.__module__):
        raise PlanError(f"score {name!r} is registered already. Choose another name.")
    SALIENCIES[name] = function
    return function


def score_named(name: str) -> Score:
    """The score registered under this name; PlanError for another name."""
    if name in SALIENCIES:
        return Given(name)
    if name not in SCORES:
        raise PlanError(f"expected a score among {', '.join(sorted({*SCORES, *SALIENCIES}))}, got {name!r}.")
    return SCORES[name]


def _precise(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
