"""CHASE: dynamic sparse training that ends on fewer channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Choice, Extra, Method, Probe, WeightView, register
from fxsparse.pattern import Unstructured
from fxsparse.reparam import HardMask
from fxsparse.schedule import Constant, CubicRamp, Schedule
from fxsparse.scores import score_named
from fxsparse.selection import to_mask
from fxsparse.topk import top_mask


def nowhere(weight: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """The start of an `Extra` that says which entries are gone for good."""
    del mask, generator
    return torch.zeros_like(weight, dtype=torch.bool)


@dataclass(frozen=True)
class RemoveChannelsAndExchange:
    """Take away the channels of least mean ``|w|``, then exchange entries of all weights within what is left.

    A channel is a row, zeros included in its mean; rows that are one channel (added to each other, as
    ``WeightView.channels`` has it) go together, by their mean.  All weights' channels are ranked together, and none
    keeps fewer than ``ceil(floor rows)``: what it would have lost goes to others.  A channel that is gone never comes
    back, and its entries are spent on others.  Then the smallest ``ceil(r total)`` magnitudes of all weights go, and
    the largest gradients of all come, to the total exactly.
    """

    shares: CubicRamp
    sparsity: float
    channel_every: int
    floor: float

    @property
    def probe(self) -> Probe:
        return Probe.DENSE

    def __call__(self, view: WeightView) -> Choice:
        """The choice of a weight alone."""
        return self.choose_all([view], view.nnz)[0]

    def choose_all(self, views: Sequence[WeightView], total: int) -> list[Choice]:
        gone = [view.extras["gone"].reshape(view.shape[0], -1)[:, 0].clone() for view in views]
        if views[0].step % self.channel_every == 0:
            self.remove(views, gone, total)
        inside = [(~dead).repeat_interleave(prod(v.shape[1:])) for v, dead in zip(views, gone, strict=True)]
        active = [
            to_mask(v.active, v.shape).flatten() & there for v, there in zip(views, inside, strict=True)
        ]
        stay = min(total - ceil(views[0].drop_fraction * total), sum(int(a.sum()) for a in active))
        sizes = torch.cat([_sizes(v) for v in views])
        kept = top_mask(sizes.masked_fill(~torch.cat(active), -torch.inf), stay)
        steep = torch.cat([torch.cat([t.abs().flatten() for _, t in v.gradient_tiles()]) for v in views])
        steep = steep.clamp(max=torch.finfo(steep.dtype).max).masked_fill(~torch.cat(inside), -torch.inf)
        chosen = top_mask(steep.masked_fill(kept, torch.inf), total).split([len(a) for a in active])
        return [
            Choice(mask.view(v.shape), {"gone": (~there).view(v.shape)})
            for mask, there, v in zip(chosen, inside, views, strict=True)
        ]

    def remove(self, views: Sequence[WeightView], gone: list[Tensor], total: int) -> None:
        """Mark in place the rows that go at this step."""
        places = [(k, row) for k, view in enumerate(views) for row in range(view.shape[0]) if view.ablates]
        wanted = self._share(views[0].step) * len(places)
        groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for k, row in places:
            label = (-1, views[k].channels[row]) if views[k].channels else (k, row)
            groups.setdefault(label, []).append((k, row))
        means = [_sizes(view).view(view.shape[0], -1).double() for view in views]
        sums, columns = [m.sum(1).tolist() for m in means], [m.shape[1] for m in means]
        dead = [flags.tolist() for flags in gone]
        alive = [view.shape[0] - sum(flags) for view, flags in zip(views, dead, strict=True)]
        room = sum(a * c for a, c in zip(alive, columns, strict=True)) - total
        count = sum(map(sum, dead))
        least = [ceil(self.floor * view.shape[0]) for view in views]
        worth = lambda rows: sum(sums[k][r] for k, r in rows) / sum(columns[k] for k, _ in rows)  # noqa: E731
        for rows in sorted(groups.values(), key=worth):
            here = [k for k, _ in rows]
            cost = sum(columns[k] for k in here)
            fits = all(alive[k] - here.count(k) >= max(1, least[k]) for k in here)
            if dead[rows[0][0]][rows[0][1]] or not fits or cost > room or count + len(rows) > wanted:
                continue
            for k, row in rows:
                gone[k][row], dead[k][row], alive[k] = True, True, alive[k] - 1
            room, count = room - cost, count + len(rows)

    def _share(self, step: int) -> float:
        left = self.shares(step, 0, 1_000_000) / 1_000_000
        return self.sparsity * (1 - left)


def _sizes(view: WeightView) -> Tensor:
    values = view.values.detach().abs()
    return values.new_zeros(prod(view.shape)).scatter_(0, view.active, values)


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
    for name, value in (("channel_sparsity", channel_sparsity), ("floor", floor)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise PlanError(f"expected {name} as a share from 0 to below 1, got {value!r}.")
    if channel_sparsity > 1 - floor:
        raise PlanError(
            f"expected floor <= 1 - channel_sparsity, got {floor} and {channel_sparsity}: too few channels could go."
        )
    if not isinstance(channel_every, int) or channel_every < 1 or channel_every % every:
        raise PlanError(f"expected channel_every as a multiple of every={every}, got {channel_every!r}.")
    if type(channel_stop) is not int or channel_stop < 1:
        raise PlanError(f"expected channel_stop as an integer >= 1, got {channel_stop!r}.")
    if channel_sparsity and stop is not None and -(-channel_stop // channel_every) * channel_every >= stop:
        raise PlanError(
            f"expected channel_stop at or before the last multiple of channel_every={channel_every} below stop={stop}, "
            f"got {channel_stop}: the ramp would end short of channel_sparsity={channel_sparsity}."
        )
    return Method(
        name="chase",
        reparam=HardMask(),
        init=score_named(init),
        rule=RemoveChannelsAndExchange(
            CubicRamp(0.0, 0, channel_stop), channel_sparsity, channel_every, floor
        ),
        schedule=schedule,
        source="arXiv:2305.19454",
        pattern=Unstructured(),
        never_ablate=(),
        state=(Extra("gone", nowhere),),
    )
