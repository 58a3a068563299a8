"""The price of a weight in microseconds: its fastest kernels at several densities, measured here."""

import math
import time

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import kernel
from fxsparse.budget import Budget
from fxsparse.formats import condensed
from fxsparse.graph import argument, fetch, sites
from fxsparse.kernel import Problem
from fxsparse.passes.select_kernels import OPS, outputs_of_a_row, site_arguments, site_inputs
from fxsparse.pipeline import PassContext
from fxsparse.prices import Price, Prices
from fxsparse.selection import random_positions, to_mask
from fxsparse.skeleton import bind
from fxsparse.verify import copied_inputs, frozen_state

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
"""Where kernels are measured; above the last, and wherever it is faster, dense counts."""


def latency_prices(gm: GraphModule, ctx: PassContext, budget: Budget) -> Prices:
    """Measure all selected weights and the dense model; both on the evaluation graph's example inputs."""
    graph = ctx.program.graphs["eval"]
    found = {name: [s for s in sites(graph, name) if s.op in OPS and not s.sliced] for name in ctx.weights}
    inputs = site_inputs(graph, ctx, [site.node for calls in found.values() for site in calls])
    prices = {}
    for name, spec in ctx.weights.items():
        points: dict[int, float] = {}
        for density in DENSITIES if found[name] else ():
            nnz = max(1, round(density * spec.numel))
            times = [_times(graph, site, inputs[site.node], nnz) for site in found[name]]
            dense = sum(_best(each, "dense") for each in times)
            points[nnz] = min(dense, sum(_best(each) for each in times))
            points[spec.numel] = dense
        prices[name] = Price(tuple(sorted(_monotone(points).items())) or ((0, 0.0),))
    whole = _model_us(ctx)
    return Prices(prices, "us", whole, whole - sum(p.points[-1][1] for p in prices.values()), budget.share)


def _times(graph: GraphModule, site, x: Tensor, nnz: int) -> dict[str, float]:
    """Microseconds of all kernels at one call site for a weight with so many random entries."""
    weight = fetch(graph, str(site.weight.target)).detach()
    weight = weight.t().contiguous() if site.transposed else weight
    positions = random_positions(
        min(nnz, weight.numel() // 2), weight.numel(), torch.Generator().manual_seed(0)
    )
    pruned = torch.where(to_mask(positions, weight.shape), weight, 0)
    pruned[to_mask(positions, weight.shape) & (pruned == 0)] = 1e-3  # a weight may be 0 where it is kept
    bias = argument(site.node, 2, "bias")
    bias = (
        fetch(graph, str(bias.target)).detach()
        if isinstance(bias, torch.fx.Node) and bias.op == "get_attr"
        else None
    )
    problem = Problem(
        "linear" if site.op == "linear" else "conv2d",
        tuple(weight.shape),
        outputs_of_a_row(site, x, weight.shape),
        len(positions),
        weight.dtype,
        weight.device,
        training=False,
        fan_in=condensed.fan_in(pruned.flatten(1) != 0),
        arguments=tuple(site_arguments(site, weight.shape).items()),
    )
    return dict(kernel.choose(problem, x, pruned, bias).times_us)


def _best(times: dict[str, float], form: str | None = None) -> float:
    entries = kernel.registered()
    return min(
        (t for name, t in times.items() if form is None or entries[name].format == form), default=math.inf
    )


def _monotone(points: dict[int, float]) -> dict[int, float]:
    """No count costs less than a smaller one does: what it measured above a larger one was noise."""
    least, result = math.inf, {}
    for nnz in sorted(points, reverse=True):
        least = min(least, points[nnz])
        result[nnz] = least
    return result


def _model_us(ctx: PassContext) -> float:
    """The dense evaluation graph: the lower quartile of its forwards, within about two seconds."""
    args, kwargs = copied_inputs(ctx.example_inputs)
    graph, taken = bind(ctx.program.graphs["eval"].graph, ctx.program.skeleton), []
    with frozen_state(ctx.program.skeleton, training=False), torch.no_grad():
        began = time.perf_counter()
        while len(taken) < 5 or (len(taken) < 31 and time.perf_counter() - began < 2):
            start = time.perf_counter()
            graph(*args, **kwargs)
            taken.append(1e6 * (time.perf_counter() - start))
    return sorted(taken)[len(taken) // 4]
