"""The price of a weight in microseconds: its fastest kernels at several densities, measured here."""

import copy
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import kernel
from fxsparse.budget import Budget
from fxsparse.graph import Site, sites
from fxsparse.passes.choose_layouts import ChooseLayouts
from fxsparse.passes.fuse_epilogue import FuseEpilogue
from fxsparse.passes.lower_inference import LowerInference
from fxsparse.passes.pack_lanes import PackLanes
from fxsparse.passes.round_values import RoundValues
from fxsparse.passes.select_entry_kernels import SelectEntryKernels
from fxsparse.passes.select_kernels import (
    OPS,
    SelectKernels,
    choose_at,
    matrix_of,
    site_inputs,
    site_problem,
)
from fxsparse.passes.split_samples import SplitSamples
from fxsparse.pattern import Block, Pattern, Unstructured
from fxsparse.pipeline import PassContext, Program, run_passes
from fxsparse.prices import Price, Prices
from fxsparse.report import Report
from fxsparse.skeleton import bind, copy_structure
from fxsparse.verify import copied_inputs, frozen_state

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""Where kernels are measured; above the last, and wherever it is faster, dense counts."""

_AFTER_CHOICE = (
    SelectKernels, SelectEntryKernels, ChooseLayouts, RoundValues, LowerInference, FuseEpilogue, SplitSamples,
    PackLanes,
)  # fmt: skip


def latency_prices(gm: GraphModule, ctx: PassContext, budget: Budget) -> Prices:
    """Measure all selected weights, and what inference takes for the rest; both together are the dense model."""
    folded = _all_dense(ctx)
    graph = folded.program.graphs["eval"]
    found = {name: [s for s in sites(graph, name) if s.op in OPS and not s.sliced] for name in ctx.weights}
    inputs = site_inputs(graph, folded, [site.node for calls in found.values() for site in calls])
    assert ctx.plan is not None
    prices = {
        name: _price(graph, calls, inputs, spec.numel, ctx.plan.pattern)
        for (name, calls), spec in zip(found.items(), ctx.weights.values(), strict=True)
    }
    at_sites = {site.node.name for calls in found.values() for site in calls}
    rest = _others_us(folded, at_sites)
    return Prices(
        prices, "us", rest + sum(price.points[-1][1] for price in prices.values()), rest, budget.share
    )


def _all_dense(ctx: PassContext) -> PassContext:
    """The evaluation graph as inference compiles it, with PyTorch's own op at every weight."""
    from fxsparse.passes import inference_pipeline  # where the order is stated, which imports this module

    skeleton = copy_structure(ctx.program.skeleton).eval()
    graph = bind(copy.deepcopy(ctx.program.graphs["eval"].graph), skeleton)
    program = Program(ctx.program.tier, skeleton, {"eval": graph}, [], dict(ctx.program.hidden))
    folded = PassContext(None, "infer", program, Report(), ctx.example_inputs)
    # Calls are timed on the whole batch that the example inputs are.
    run_passes([p for p in inference_pipeline if not isinstance(p, _AFTER_CHOICE)], folded)
    return folded


def _price(
    graph: GraphModule, calls: list[Site], inputs: dict[Node, Tensor], numel: int, pattern: Pattern
) -> Price:
    """Of a weight over all its call sites; nothing where no op that has sparse kernels reads it as a whole."""
    points: dict[int, float] = {}
    for density in DENSITIES if calls else ():
        nnz = max(1, round(density * numel))
        times = [_times(graph, site, inputs[site.node], nnz, pattern) for site in calls]
        dense = sum(_best(each, "dense") for each in times)
        points[nnz], points[numel] = min(dense, sum(_best(each) for each in times)), dense
    return Price(tuple(sorted(_monotone(points).items())) or ((0, 0.0),))


def _times(graph: GraphModule, site: Site, x: Tensor, nnz: int, pattern: Pattern) -> dict[str, float]:
    """Microseconds of all kernels at one call site, for a weight with about so many entries in random places."""
    weight = matrix_of(graph, site)
    score = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    blocks = pattern if isinstance(pattern, Block) else Unstructured()
    mask = blocks.project(score.to(weight.device), nnz)
    kept = torch.where(weight == 0, 1e-3, weight)  # a weight may be 0 where its entry stays
    pruned = torch.where(mask, kept, 0)
    problem = site_problem(site, pruned, x, int(mask.sum()), isinstance(pattern, Block))
    return dict(choose_at(graph, site, problem, pruned, x).times_us)


def _best(times: dict[str, float], form: str | None = None) -> float:
    entries = kernel.registered()
    return min(
        (t for name, t in times.items() if form is None or entries[name].format == form), default=math.inf
    )


def _monotone(points: dict[int, float]) -> dict[int, float]:
    """No count costs more than a larger one: what it measured above that was noise."""
    least, result = math.inf, {}
    for nnz in sorted(points, reverse=True):
        least = min(least, points[nnz])
        result[nnz] = least
    return result


@dataclass
class _Held:
    """Computes an op once, and hands out its result from then on."""

    op: Callable[..., Tensor]
    result: Tensor | None = None

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.result is None:
            self.result = self.op(*args, **kwargs)
        return self.result


def _others_us(ctx: PassContext, calls: Collection[str]) -> float:
    """What a forward takes without these calls, whose results are there already."""
    program, graph = ctx.program, copy.deepcopy(ctx.program.graphs["eval"].graph)
    for node in graph.nodes:
        if node.name in calls:
            node.target = _Held(node.target).run
    held = Program(program.tier, program.skeleton, {"eval": bind(graph, program.skeleton)})
    return _model_us(PassContext(None, "infer", held, Report(), ctx.example_inputs))


def _model_us(ctx: PassContext) -> float:
    """The evaluation graph: the lower quartile of its forwards, within about two seconds."""
    args, kwargs = copied_inputs(ctx.example_inputs)
    graph, taken = bind(ctx.program.graphs["eval"].graph, ctx.program.skeleton), []
    with frozen_state(ctx.program.skeleton, training=False), torch.no_grad():
        began = time.perf_counter()
        while len(taken) < 5 or (len(taken) < 31 and time.perf_counter() - began < 2):
            start = time.perf_counter()
            graph(*args, **kwargs)
            taken.append(1e6 * (time.perf_counter() - start))
    return sorted(taken)[len(taken) // 4]
