"""Find out what the entries of every selected weight cost, where a plan has a budget instead of a sparsity."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch.fx import GraphModule

from fxsparse.budget import Budget
from fxsparse.errors import PlanError
from fxsparse.flops import count_program
from fxsparse.globs import matches, unmatched
from fxsparse.graph import fetch
from fxsparse.passes.time_weights import latency_prices
from fxsparse.pipeline import PassContext
from fxsparse.prices import Price, Prices


@dataclass(frozen=True)
class PriceWeights:
    """Fill ``ctx.prices`` in the unit of the plan's budget; a plan with a sparsity needs none.

    Raises:
        PlanError: FLOPs or time without example inputs, time of a model on meta, or a glob of the budget's costs that
            names no weight.
    """

    name: ClassVar[str] = "price-weights"
    after: ClassVar[tuple[str, ...]] = ("collect-weights",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Changes no graph, so it returns 0."""
        if ctx.plan is None or ctx.plan.budget is None or ctx.prices is not None or ctx.decisions:
            return 0
        budget = ctx.plan.budget
        if budget.kind == "latency":
            _refuse_meta(ctx)
        if budget.kind in ("flops", "latency") and not any("val" in node.meta for node in gm.graph.nodes):
            raise PlanError(
                f"Budget({budget.kind}=): expected example inputs, whose shapes decide what a weight costs, got none: "
                "pass example_inputs=, or give a budget of bytes, or of a total with costs."
            )
        made = _PRICES[budget.kind]
        ctx.prices = made(gm, ctx, budget)
        return 0


def _refuse_meta(ctx: PassContext) -> None:
    for name, tensor in ctx.program.skeleton.state_dict().items():
        if tensor.is_meta:
            raise PlanError(
                f"Budget(latency=): expected a model with values, whose kernels can be timed, and {name!r} is on meta: "
                "load the weights first, or give a budget of flops, parameters or bytes."
            )


def _parameters(gm: GraphModule, ctx: PassContext, budget: Budget) -> Prices:
    prices = {name: Price(((0, 0.0), (spec.numel, float(spec.numel)))) for name, spec in ctx.weights.items()}
    whole = sum(parameter.numel() for parameter in ctx.program.skeleton.parameters())
    selected = sum(spec.numel for spec in ctx.weights.values())
    return Prices(prices, "parameters", whole, whole - selected, budget.share)


def _flops(gm: GraphModule, ctx: PassContext, budget: Budget) -> Prices:
    count = count_program(gm)
    dense = {name: count.of_weight(name)[0] or 0 for name in ctx.weights}
    prices = {name: Price(((0, 0.0), (ctx.weights[name].numel, float(cost)))) for name, cost in dense.items()}
    return Prices(prices, "FLOP", count.dense, count.dense - sum(dense.values()), budget.share)


def _bytes(gm: GraphModule, ctx: PassContext, budget: Budget) -> Prices:
    """As kernels pack CSR: 16-bit columns where they fit, and row pointers; never more than dense."""
    prices, whole = {}, sum(parameter.nbytes for parameter in ctx.program.skeleton.parameters())
    for name, spec in ctx.weights.items():
        size, rows = spec.dtype.itemsize, spec.shape[0]
        entry = size + (2 if prod(spec.shape[1:]) <= 32767 else 4)
        dense, pointers = spec.numel * size, 4 * (rows + 1)
        turn = max(0, min(spec.numel, (dense - pointers) // entry))  # beyond it dense storage is smaller
        ends = {
            n: float(min(dense, pointers + n * entry))
            for n in (0, turn, min(spec.numel, turn + 1), spec.numel)
        }
        prices[name] = Price(tuple(ends.items()))
    selected = sum(fetch(ctx.program.skeleton, name).nbytes for name in ctx.weights)
    return Prices(prices, "byte", whole, whole - selected, budget.share)


def _total(gm: GraphModule, ctx: PassContext, budget: Budget) -> Prices:
    costs = budget.cost or {}
    if lost := unmatched(costs, ctx.weights):
        known = ", ".join(list(ctx.weights)[:3]) or "no weight at all"
        raise PlanError(
            f"Budget(cost={{{lost[0]!r}: ...}}): expected a glob of selected weights, it names none of {known}, ...; "
            "check the spelling, or whether the weight is excluded."
        )
    each = {name: next((c for glob, c in costs.items() if matches(glob, name)), 1.0) for name in ctx.weights}
    prices = {
        name: Price(((0, 0.0), (spec.numel, each[name] * spec.numel))) for name, spec in ctx.weights.items()
    }
    return Prices(
        prices, "units of cost", sum(each[n] * s.numel for n, s in ctx.weights.items()), 0.0, budget.share
    )


_PRICES = {
    "parameters": _parameters,
    "flops": _flops,
    "bytes": _bytes,
    "latency": latency_prices,
    "total": _total,
}
