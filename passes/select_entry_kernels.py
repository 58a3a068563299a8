"""Pick the kernel of every weight that is too large to be made dense, among those that pack nonzeros."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import choosing, kernel, module
from fxsparse.graph import Site, site_arguments, sites
from fxsparse.inputs import has_meta
from fxsparse.kernel import Entries, Problem
from fxsparse.passes.select_kernels import ADVANTAGE, choose_at, narrower, outputs_of_a_row, site_inputs
from fxsparse.pattern import ConstantFanIn
from fxsparse.pipeline import Decision, PassContext


@dataclass(frozen=True)
class SelectEntryKernels:
    """Fill ``format``, ``kernel``, ``reason`` and ``sparse_us`` of the decisions for ``ctx.entries``.

    The kernel is the one that measures fastest over all call sites on the inputs that these really get; without
    example inputs the first that can run; where none can, that of training.
    """

    name: ClassVar[str] = "select-entry-kernels"
    after: ClassVar[tuple[str, ...]] = ("select-kernels",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Changes no graph, so it returns 0."""
        found = {name: sites(gm, name) for name in ctx.entries}
        inputs = {}
        if ctx.example_inputs is not None and not has_meta(ctx.example_inputs):
            inputs = site_inputs(gm, ctx, [site.node for calls in found.values() for site in calls])
        for name, calls in found.items():
            _decide(gm, ctx, name, calls, inputs)
        return 0


def _decide(
    gm: GraphModule, ctx: PassContext, name: str, calls: list[Site], inputs: dict[Node, Tensor]
) -> None:
    entries, decision = ctx.entries[name], ctx.decisions[name]
    allowed, why_not = narrower(ctx, ctx.weights[name], entries.values)
    problems = [_problem(entries, decision, site, inputs.get(site.node), allowed) for site in calls]
    usable, refusals = kernel.candidates(problems[0], by_entries=True)
    if usable and inputs:
        choices = [
            choose_at(gm, site, problem, entries, inputs[site.node])
            for site, problem in zip(calls, problems, strict=True)
        ]
        everywhere = set.intersection(*(set(choice.times_us) for choice in choices))
        total = {n: sum(choice.times_us[n] for choice in choices) for n in everywhere}
        taken, _ = choosing.taken_of(total, ADVANTAGE)
        decision.sparse_us, reason = total[taken], f"{taken} {total[taken]:.1f} us"
    elif usable:
        taken, reason = usable[0].name, "not measured: there are no example inputs"
    else:
        taken = kernel.trained_by(calls[0].op, entries.values.device).name
        reason = f"the kernel of training: {'; '.join(f'{n}: {why[0]}' for n, why in refusals.items())}"
    decision.storage, decision.kernel = "compact", taken
    decision.format = kernel.registered()[taken].format
    decision.values_dtype = kernel.registered()[taken].values
    decision.reason = f"{reason}{why_not}; {why_not_dense(ctx)}"


def why_not_dense(ctx: PassContext) -> str:
    """What a report says of weights that were never made dense."""
    needed = sum(torch.Size(e.shape).numel() * e.values.element_size() for e in ctx.entries.values())
    return (
        f"neither compared with dense nor timed against it: dense weights would take {needed:,} bytes, more than "
        f"{module.MAX_DENSE_BYTES:,}"
    )


def _problem(
    entries: Entries, decision: Decision, site: Site, x: Tensor | None, values: torch.dtype | None
) -> Problem:
    fan_in = decision.pattern.fan_in if isinstance(decision.pattern, ConstantFanIn) else None
    batch = 1 if x is None else outputs_of_a_row(site, x, entries.shape)
    return Problem(
        "linear" if site.op == "linear" else "conv2d",
        entries.shape,
        batch,
        decision.nnz,
        entries.values.dtype,
        entries.values.device,
        training=False,
        fan_in=fan_in,
        arguments=tuple(site_arguments(site, entries.shape).items()),
        values=values,
    )
