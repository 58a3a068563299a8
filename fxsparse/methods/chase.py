"""CHASE: dynamic sparse training that ends on fewer channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from fxsparse.channel_removal import remove_channels
from fxsparse.errors import PlanError
from fxsparse.method import Choice, Extra, Method, Probe, WeightView, register
from fxsparse.options import check_integer, check_share, is_integer
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask, Zeros
from fxsparse.rules import GradientMagnitude, magnitudes, put
from fxsparse.schedule import Constant, Rising, Schedule
from fxsparse.scores import score_named
from fxsparse.selection import to_positions
from fxsparse.topk import top_of_all


@dataclass(frozen=True)
class RemoveChannelsAndExchange:
    """Take away the channels of least mean ``|w|``, then exchange entries of all weights within what is left.

    All weights' channels are ranked together (`remove_channels`).  A channel that is gone never comes back, and its
    entries are spent on others.  Then the smallest ``ceil(r total)`` magnitudes of all weights go, and the largest
    gradients of all come, to the total exactly.
    """

    share: Rising
    """Of all channels, how many are gone at a step."""
    channel_every: int
    floor: float

    probe = Probe.DENSE

    def __call__(self, view: WeightView) -> Choice:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Choice]:
        gone = [view.extras["gone"].flatten(1)[:, 0].clone() for view in views]
        if views[0].step % self.channel_every == 0:
            remove_channels(views, gone, self.share(views[0].step), self.floor, total)
        without = [dead.repeat_interleave(prod(v.shape[1:])) for v, dead in zip(views, gone, strict=True)]
        sizes = [magnitudes(view, elsewhere=-torch.inf) for view in views]
        sizes = [size.masked_fill(out, -torch.inf) for size, out in zip(sizes, without, strict=True)]
        kept = top_of_all(sizes, total - ceil(views[0].drop_fraction * total))
        steep = [_steepness(view, to_positions(mask)) for view, mask in zip(views, kept, strict=True)]
        steep = [size.masked_fill(out, -torch.inf) for size, out in zip(steep, without, strict=True)]
        return [
            Choice(mask.view(view.shape), {"gone": out.view(view.shape)})
            for mask, out, view in zip(top_of_all(steep, total), without, views, strict=True)
        ]


def _steepness(view: WeightView, kept: Tensor) -> Tensor:
    """Flat ``|gradient|``, and inf at the positions that are kept."""
    tiles = put(torch.inf, kept, GradientMagnitude().tiles(view), prod(view.shape[1:]))
    return torch.cat([tile.flatten() for _, tile in tiles])


@register
def chase(
    every: int = 1_000,
    stop: int = 62_560,
    channel_sparsity: float = 0.5,
    channel_every: int = 1_000,
    channel_stop: int = 50_830,
    floor: float = 0.2,
    drop_fraction: float = 0.05,
    init: str = "random",
) -> Method:
    """Exchange entries by magnitude and gradient, and take whole channels away on the way: Yin et al. 2023,
    arXiv:2305.19454.

    Updates follow the optimizer's step at every `every`-th below `stop`, the end of training.  At those that
    `channel_every` divides, channels go, along a cubic ramp that reaches `channel_sparsity` of them at `channel_stop`
    (epoch 130 of 160); every weight keeps `floor` of its own (0.2 or 0.5 in the paper), outputs of the model keep all.
    With example inputs at compile, rows that residual connections add up are one channel.  Inference removes rows of
    zeros with what reads them, so that the model is really smaller.  Nonzeros drift among weights; their total stays.
    The soft memory bound of the authors' code is left out.
    """
    schedule = Schedule(every, stop, every, drop_fraction=Constant(drop_fraction))
    check_share("channel_sparsity", channel_sparsity)
    check_share("floor", floor)
    if channel_sparsity > 1 - floor:
        raise PlanError(
            f"expected floor <= 1 - channel_sparsity, got {floor} and {channel_sparsity}: too few channels could go."
        )
    if not is_integer(channel_every, 1) or channel_every % every:
        raise PlanError(f"expected channel_every as a multiple of every={every}, got {channel_every!r}.")
    check_integer("channel_stop", channel_stop, 1)
    if channel_sparsity and stop is not None and -(-channel_stop // channel_every) * channel_every >= stop:
        raise PlanError(
            f"expected channel_stop at or before the last multiple of channel_every={channel_every} below stop={stop}, "
            f"got {channel_stop}: the ramp would end short of channel_sparsity={channel_sparsity}."
        )
    return Method(
        name="chase",
        reparam=HardMask(),
        init=score_named(init),
        rule=RemoveChannelsAndExchange(Rising(channel_sparsity, 0, channel_stop), channel_every, floor),
        schedule=schedule,
        source="arXiv:2305.19454",
        pattern=Unstructured(),
        never_ablate=(),
        state=(Extra("gone", Zeros(torch.bool)),),
    )
