"""The masks and weights that training starts from, or goes on with."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fxsparse.creation import AT_CREATION
from fxsparse.errors import NumericsError
from fxsparse.formats import csr
from fxsparse.graph import fetch
from fxsparse.initial_scores import given_score
from fxsparse.knapsack import KeepLargest, refuse_diverged
from fxsparse.pattern import Unstructured
from fxsparse.pipeline import PassContext
from fxsparse.rng import generator_for
from fxsparse.scores import Given, random_tiles
from fxsparse.selection import random_positions, to_positions
from fxsparse.update_mask import Target

BEFORE_TRAINING = -1
"""The step number that seeds initial masks."""


def target_of(ctx: PassContext, name: str) -> Target:
    """What the updates of a weight need to know."""
    spec, decision = ctx.weights[name], ctx.decisions[name]
    shape = spec.shape[::-1] if spec.transposed else spec.shape
    return Target(
        shape,
        decision.pattern,
        decision.nnz,
        decision.budget,
        spec.transposed,
        decision.ablates,
        decision.cost,
        decision.price,
        decision.limit,
        decision.initial,
        decision.feeds,
        decision.channels,
        decision.dense,
        decision.settled,
    )


@torch.no_grad()
def initial_mask(ctx: PassContext, name: str) -> Tensor:
    """Bool mask in the user's layout, by the method's score and with exactly as many ones as the pattern allows."""
    assert ctx.plan is not None
    if ctx.state is not None:
        return ctx.state[f"{name}_mask"].clone()
    target, method = target_of(ctx, name), ctx.plan.method
    if isinstance(method.init, Given):
        given = given_score(ctx, name)
        score = given.t() if target.transposed else given
    else:
        weight = fetch(ctx.program.skeleton, name).detach()
        score = method.init(
            weight.t() if target.transposed else weight, generator_for(ctx.plan.seed, name, BEFORE_TRAINING)
        )
    if isinstance(method.rule, KeepLargest):
        refuse_diverged(fetch(ctx.program.skeleton, name).detach(), score, name, "before training")
    try:
        mask = target.pattern.project(score, target.nnz_at(BEFORE_TRAINING, method))
    except NumericsError as error:
        raise NumericsError(f"weight {name!r}: {error}") from error
    return (mask.t() if target.transposed else mask).contiguous()


def initial_positions(ctx: PassContext, name: str) -> Tensor:
    """Flat positions of the entries that compact storage starts with, int64, ascending."""
    if ctx.state is None:
        assert ctx.plan is not None
        scored = isinstance(ctx.plan.method.init, Given)
        on_meta = fetch(ctx.program.skeleton, name).is_meta and not scored
        return _random_positions(ctx, name) if on_meta else to_positions(initial_mask(ctx, name))
    rows, *fan_in = ctx.weights[name].shape
    return csr.positions_in(ctx.state[f"{name}.indices"], (rows, torch.Size(fan_in).numel()))


def capacity(ctx: PassContext, name: str) -> int:
    """Entries that compact storage has room for: the budget where updates may change their count, else nnz."""
    assert ctx.plan is not None
    decision = ctx.decisions[name]
    return decision.budget if ctx.plan.method.varying_nnz else decision.nnz


def initial_values(ctx: PassContext, name: str, positions: Tensor) -> Tensor | None:
    """Values of the active entries, float32 in the order of `positions`; None where the weights stay as they come."""
    assert ctx.plan is not None
    draw = ctx.plan.method.weight_init
    if draw is None or not _is_drawn(ctx, name):
        return None
    shape = target_of(ctx, name).shape
    rows = positions.cpu() // torch.Size(shape[1:]).numel()
    fan_in = torch.bincount(rows, minlength=shape[0])[rows].float()
    return draw(fan_in, generator_for(ctx.plan.seed, f"{name} values", BEFORE_TRAINING)).to(positions.device)


def note_drawn(ctx: PassContext, names: Iterable[str]) -> None:
    """Tell the report of weights whose values the method drew anew."""
    assert ctx.plan is not None
    drawn = [name for name in names if _is_drawn(ctx, name)]
    if ctx.plan.method.weight_init is not None and drawn:
        ctx.notes.append(
            f"the values of {len(drawn)} selected weights were drawn anew, as {ctx.plan.method.name} does; "
            "weight_init='keep' leaves yours"
        )


def _is_drawn(ctx: PassContext, name: str) -> bool:
    """A module that is built again has its values, and a frozen weight is there for its."""
    return ctx.state is None and fetch(ctx.program.skeleton, name).requires_grad


@torch.no_grad()
def stored_values(ctx: PassContext, name: str, positions: Tensor) -> Tensor:
    """What the entries at `positions` start with, [nnz]: a checkpoint's values, the method's, else the weight's.

    A weight on meta has none; they are drawn as its module would draw them.
    """
    if ctx.state is not None:
        return ctx.state[f"{name}.values"][: len(positions)].clone()
    weight, drawn = fetch(ctx.program.skeleton, name), initial_values(ctx, name, positions)
    if drawn is not None:
        return drawn.to(weight.dtype)
    if not weight.is_meta:
        return weight.detach().flatten()[positions]
    assert ctx.plan is not None
    generator = generator_for(ctx.plan.seed, name, AT_CREATION)
    return ctx.draws[name].values(len(positions), weight.dtype, ctx.device, generator)


def _random_positions(ctx: PassContext, name: str) -> Tensor:
    """Entries of a weight that exists on meta only, each mask of the pattern as likely as any other.

    An unstructured mask takes time and memory in proportion to its nnz; other patterns draw a score for every entry,
    in row tiles.
    """
    assert ctx.plan is not None
    target = target_of(ctx, name)
    nnz, numel = target.nnz_at(BEFORE_TRAINING, ctx.plan.method), torch.Size(target.shape).numel()
    generator = generator_for(ctx.plan.seed, name, BEFORE_TRAINING)
    if isinstance(target.pattern, Unstructured) and 2 * nnz <= numel:
        return random_positions(nnz, numel, generator).to(ctx.device)
    tiles = random_tiles(target.shape, generator, ctx.device)
    return target.pattern.project_tiles(tiles, target.shape, nnz)
