"""Give every selected weight its pattern and its number of nonzeros."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.fx import GraphModule

from fxsparse.allocation import Target, by_magnitude_per_cost, resolve, target_densities
from fxsparse.errors import PatternError, PlanError
from fxsparse.globs import matches, unmatched
from fxsparse.initial_scores import given_score
from fxsparse.knapsack import KeepLargest
from fxsparse.method import Method
from fxsparse.pattern import Pattern, Unstructured
from fxsparse.pipeline import Decision, PassContext, WeightSpec
from fxsparse.plans import Override, Plan
from fxsparse.prices import Prices

MOST_SPARSE = 0.9999
"""Sparsity beyond which no budget is tried."""
_NOTED = 0.001
"""Difference in sparsity from which on a note says so."""


@dataclass(frozen=True)
class AllocateNnz:
    """Fill `ctx.decisions`: pattern, sparsity_target, budget, and nnz = what the pattern can hold of the budget.

    Rewrites nothing.  A weight that the plan keeps dense becomes an excluded one where the method decides counts by
    itself, or freezes weights: nothing would hold it to the plan.  A weight whose pattern allows one count only (N:M, a
    given fan-in) is not the allocation's to decide.  The first override whose glob names a weight decides for it.

    Raises:
        PlanError: an override that names no weight, or a weight that would keep no entry.
        PatternError: a shape that the pattern does not fit; the message names the weight.
    """

    name: ClassVar[str] = "allocate-nnz"
    after: ClassVar[tuple[str, ...]] = ("collect-weights", "price-weights")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if ctx.plan is None:
            return 0
        if ctx.weights and not ctx.decisions:
            made = decide(ctx.plan, ctx)
            ctx.decisions.update({n: d for n, d in made.items() if not _left_out(ctx.plan.method, d)})
        for name in [name for name in ctx.weights if name not in ctx.decisions]:
            ctx.excluded[name] = ctx.weights.pop(name)
            ctx.untouched[name] = f"the plan keeps it dense, and {ctx.plan.method.name} would not"
        return 0


def decide(plan: Plan, ctx: PassContext) -> dict[str, Decision]:
    """The decision for every weight of `ctx.weights`; changes nothing."""
    wishes = _overrides(plan, ctx.weights)
    patterns = {name: _pattern(plan, wishes.get(name)) for name in ctx.weights}
    wished = {name: float(w.sparsity) for name, w in wishes.items() if w.sparsity is not None}
    _check_fit(ctx.weights, patterns)
    only = {name: _only_count(spec, patterns[name]) for name, spec in ctx.weights.items()}
    target = Target(
        sparsity=plan.sparsity or 0.0,
        forced=wished | {name: count for name, count in only.items() if count is not None},
        keep_dense_counts=plan.keep_dense_counts,
        excluded_numel=sum(spec.numel for spec in ctx.excluded.values()),
        weight=ctx.program.skeleton.get_parameter,
        score=lambda name: given_score(ctx, name),
    )
    specs = list(ctx.weights.values())
    if ctx.prices is not None:
        return _marked(_within(ctx.prices, plan, ctx, patterns, target), wishes, plan, ctx)
    budgets = resolve(plan.allocation)(specs, target)
    densities = target_densities(plan.allocation, specs, target)
    made = {s.name: _decision(s, patterns[s.name], budgets[s.name], densities[s.name]) for s in specs}
    if plan.method.initial_sparsity is not None:
        _start(plan, specs, patterns, target, made)
    if isinstance(plan.allocation, str):
        ctx.notes += _difference(plan.allocation, specs, target, made)
    else:
        ctx.notes += _written(specs, target, made)
    return _marked(made, wishes, plan, ctx)


def _start(
    plan: Plan,
    specs: list[WeightSpec],
    patterns: Mapping[str, Pattern],
    target: Target,
    made: Mapping[str, Decision],
) -> None:
    """Fill `initial`: what the allocation gives at the sparsity that the method starts from."""
    start = plan.method.initial_sparsity
    assert start is not None
    if start > target.sparsity:
        raise PlanError(
            f"{plan.method.name} starts at sparsity {start} and ends at the plan's, {target.sparsity}: expected a "
            "start that is not sparser. Lower initial_sparsity."
        )
    counts = resolve(plan.allocation)(specs, replace(target, sparsity=start))
    for spec in specs:
        made[spec.name].initial = _feasible(spec, patterns[spec.name], counts[spec.name])


def _marked(
    made: dict[str, Decision], wishes: Mapping[str, Override], plan: Plan, ctx: PassContext
) -> dict[str, Decision]:
    """Fill `dense` and `settled`."""
    for name, wish in wishes.items():
        made[name].dense = wish.sparsity == 0
    by_mask = not isinstance(plan.method.rule, KeepLargest) and not any(e.learned for e in plan.method.extras)
    written = isinstance(plan.allocation, Mapping)
    for name, decision in made.items():
        decision.dense |= written and decision.nnz == ctx.weights[name].numel
        # No rule moves the mask of a weight that does not train; learned scores and soft masks cut it all the same.
        frozen = by_mask and not ctx.weights[name].trains
        decision.settled = decision.dense or frozen
    return made


def _left_out(method: Method, decision: Decision) -> bool:
    return decision.dense and (method.learned_nnz or method.freezes_weights)


def _difference(
    allocation: str, specs: list[WeightSpec], target: Target, made: Mapping[str, Decision]
) -> list[str]:
    """A note where the weights that the allocation decides have another sparsity than was asked for."""
    free = target.free(specs)
    numel, asked = sum(s.numel for s in free), target.free_total(specs)
    given, held = sum(made[s.name].budget for s in free), sum(made[s.name].nnz for s in free)
    if abs(held - asked) <= _NOTED * numel:
        return []
    why = [f"{allocation} gives out {given:,}, as what one weight cannot hold goes to no other"] * (
        given < asked
    )
    why += [f"the patterns hold {held:,}"] * (held != given)
    return [
        f"sparsity {1 - held / numel:.4f} in place of {1 - asked / numel:.4f}: of {asked:,} entries {', '.join(why)}"
    ]


def _written(specs: list[WeightSpec], target: Target, made: Mapping[str, Decision]) -> list[str]:
    """A note where a table of sparsities gives its weights another one than the plan's."""
    free = target.free(specs)
    numel, held = sum(s.numel for s in free), sum(made[s.name].nnz for s in free)
    if abs(held - (1 - target.sparsity) * numel) <= _NOTED * numel:
        return []
    return [
        f"sparsity {1 - held / numel:.4f} in place of {target.sparsity:.4f}: the table of Plan.allocation decides, and "
        "Plan.sparsity is that of weights which it does not name"
    ]


def _within(
    prices: Prices, plan: Plan, ctx: PassContext, patterns: Mapping[str, Pattern], target: Target
) -> dict[str, Decision]:
    """What the allocation gives at the least sparsity that the budget pays for.

    That sparsity is of the weights which the allocation decides: what stays dense is in the budget by its price.
    """
    specs, costs = list(ctx.weights.values()), prices.per_entry()
    target = replace(target, keep_dense_counts=False)
    free = target.free(specs)
    most = min(MOST_SPARSE, 1 - (len(free) + 1) / max(1, sum(s.numel for s in free)))
    if plan.allocation == "global_magnitude":
        counts_at = by_magnitude_per_cost(specs, target, costs)
    else:
        policy = resolve(plan.allocation)
        counts_at = lambda sparsity: policy(specs, replace(target, sparsity=sparsity))  # noqa: E731
    sparsity, counts = prices.sparsest(counts_at, most)
    ctx.notes.append(_spent(prices, counts, sparsity, shared=getattr(plan.method.rule, "together", False)))
    fixed = sum(prices.of[s.name](s.numel) for s in specs if target.forced.get(s.name) == 0)
    made = {s.name: _decision(s, patterns[s.name], counts[s.name], counts[s.name] / s.numel) for s in specs}
    for name, decision in made.items():
        decision.cost = costs[name]
        decision.price = None if target.forced.get(name) == 0 else prices.of[name]
        decision.limit = prices.allowed - prices.rest - fixed
    return made


def _spent(prices: Prices, counts: Mapping[str, int], sparsity: float, shared: bool) -> str:
    asked = f"budget: {prices.share:g} of {prices.dense:.6g} {prices.unit}"
    outside = f"{prices.rest:.6g} of them outside of the selected weights"
    if shared:
        return (
            f"{asked} are {prices.allowed:.6g}, {outside}: from the end of the warm-up on masks keep what that pays "
            "for, at every step, and magnitudes decide how much of it goes to each weight"
        )
    return f"{asked} is met with {prices.cost(counts):.6g}, {outside}, at sparsity {sparsity:.4f}"


def _overrides(plan: Plan, weights: Mapping[str, WeightSpec]) -> dict[str, Override]:
    lost = unmatched([o.glob for o in plan.overrides], weights)
    if lost:
        known = ", ".join(list(weights)[:3]) or "no weight at all"
        raise PlanError(
            f"Override({lost[0]!r}): expected a glob of selected weights, it names none of {known}, ...; "
            "check the spelling, or whether the weight is excluded."
        )
    return {name: o for name in weights for o in reversed(plan.overrides) if matches(o.glob, name)}


def _pattern(plan: Plan, wish: Override | None) -> Pattern:
    if wish is None or (wish.pattern is None and wish.sparsity != 0):
        return plan.pattern
    # A weight kept dense has no constraint to satisfy; 2:4 would not let it be dense.
    return wish.pattern or Unstructured()


def _check_fit(weights: Mapping[str, WeightSpec], patterns: Mapping[str, Pattern]) -> None:
    """Refuse all weights at once whose shapes their patterns do not fit."""
    refused = {}
    for name, spec in weights.items():
        try:
            _feasible(spec, patterns[name], spec.numel)
        except PatternError as error:
            refused[name] = error
    if len(refused) < 2:
        for error in refused.values():
            raise error
        return
    listed = ", ".join(f"{name} {list(weights[name].shape)}" for name in refused)
    first = next(iter(refused.values()))
    raise PatternError(
        f"{len(refused)} weights do not fit their pattern: {listed}. Of the first: {first}"
    ) from first


def _only_count(spec: WeightSpec, pattern: Pattern) -> int | None:
    least, most = _feasible(spec, pattern, 0), _feasible(spec, pattern, spec.numel)
    return most if least == most else None


def _decision(spec: WeightSpec, pattern: Pattern, budget: int, density: float) -> Decision:
    nnz = _feasible(spec, pattern, budget)
    if nnz == 0:
        least = bisect_left(range(spec.numel), 1, key=lambda n: _feasible(spec, pattern, n))
        raise PlanError(
            f"weight {spec.name!r} of shape {spec.shape}: {pattern} cannot hold {budget} nonzeros "
            f"(density {budget / spec.numel:.3g}) and would keep none; its smallest feasible density is "
            f"{least / spec.numel:.3g}. Lower the sparsity, or give this weight an Override or exclude it."
        )
    return Decision(pattern, 1 - density, nnz, budget=budget)


def _feasible(spec: WeightSpec, pattern: Pattern, nnz: int) -> int:
    # Patterns read [rows, fan-in]; GPT-2's Conv1D stores the transpose.
    shape = spec.shape[::-1] if spec.transposed else spec.shape
    try:
        return pattern.feasible(shape, nnz)
    except PatternError as error:
        raise PatternError(f"weight {spec.name!r}: {error}") from error
