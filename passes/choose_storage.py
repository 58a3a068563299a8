"""Decide, weight by weight, whether training holds a dense tensor beside a mask or the nonzeros only."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxsparse import choosing, kernel
from fxsparse.errors import UnsupportedError
from fxsparse.formats import bsr
from fxsparse.graph import (
    CONVOLUTION,
    Site,
    argument,
    attribute_nodes,
    bias_of,
    example_size,
    fetch,
    given_arguments,
    site_arguments,
    sites,
)
from fxsparse.kernel import Problem
from fxsparse.pipeline import Decision, PassContext, WeightSpec

_FALLBACK = "WARNING: the plan asks for compact storage, and these weights are dense under a mask"
_LISTED = 20
"""Weights that a message names."""


@dataclass(frozen=True)
class ChooseStorage:
    """Fill ``storage``, ``format``, ``kernel`` and ``reason`` of every decision.

    "compact" where the plan allows it, nothing refuses it and (storage="auto") forward + backward measured faster
    than dense at the example shapes; else "masked".

    Raises:
        UnsupportedError: in strict mode, if the plan asks for compact storage that a weight cannot have.
    """

    name: ClassVar[str] = "choose-storage"
    after: ClassVar[tuple[str, ...]] = ("allocate-nnz", "infer-shapes")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        assert ctx.plan is not None
        for name, decision in ctx.decisions.items():
            if not decision.kernel:
                _decide(gm, name, decision, ctx)
        dense = [name for name, decision in ctx.decisions.items() if decision.storage == "masked"]
        if (
            ctx.plan.storage == "compact"
            and dense
            and not any(n.startswith(_FALLBACK) for n in ctx.program.notes)
        ):
            ctx.program.notes.append(f"{_FALLBACK}: {listed(ctx, dense)}")
        return 0


def listed(ctx: PassContext, names: list[str]) -> str:
    """Weights with shape, dense size and reason, the largest first."""
    order = sorted(names, key=lambda name: -dense_bytes(ctx, name))
    rows = [
        f"{name} {list(ctx.weights[name].shape)}, {dense_bytes(ctx, name):,} bytes ({ctx.decisions[name].reason})"
        for name in order[:_LISTED]
    ]
    more = [f"and {len(order) - _LISTED} more"] if len(order) > _LISTED else []
    return "; ".join(rows + more)


def dense_bytes(ctx: PassContext, name: str) -> int:
    """Of the dense weight, without its mask, gradient and state."""
    return ctx.weights[name].numel * ctx.weights[name].dtype.itemsize


def _decide(gm: GraphModule, name: str, decision: Decision, ctx: PassContext) -> None:
    assert ctx.plan is not None
    decision.kernel, decision.format = "dense", "dense"
    if ctx.plan.storage == "masked":
        decision.reason = "the plan asks for masked storage"
        return
    reasons = _refusals(gm, ctx.weights[name], decision, ctx)
    slow = [] if reasons else _kernel_refusals(gm, ctx.weights[name], decision, ctx)
    created = fetch(gm, name).is_meta and not reasons
    if ctx.plan.storage == "auto" and not created:
        choice = None if reasons or slow else _measure(gm, name, decision, ctx)
        decision.reason = _why(reasons or slow, choice)
        if choice is None or choice.kernel.format == "dense":
            return
        in_blocks = choice.kernel.format == "bsr"
    elif reasons:
        decision.reason = _why(reasons, None)
        if ctx.strict:
            raise UnsupportedError(
                f"{name!r}: {decision.reason}. Use storage='auto', or exclude this weight."
            )
        return
    else:
        asked = "the plan asks for compact storage"
        if ctx.plan.storage == "auto":
            asked = "created compact: on meta there is no dense weight to measure against"
        decision.reason = asked + (f"; in plain PyTorch: {slow[0]}" if slow else "")
        in_blocks = bsr.side_of(decision.pattern) is not None
    trained = kernel.trained_by(ctx.weights[name].op, _device(gm, name, ctx), in_blocks)
    decision.storage, decision.format, decision.kernel = "compact", trained.format, trained.name


def _why(refusals: list[str], choice: choosing.Choice | None) -> str:
    if refusals:
        return "no compact storage: " + "; ".join(refusals)
    return "not measured: no example inputs" if choice is None else choice.reason


def _refusals(gm: GraphModule, spec: WeightSpec, decision: Decision, ctx: PassContext) -> list[str]:
    """Why this weight cannot be stored as nonzeros only; empty if it can."""
    assert ctx.plan is not None
    method, graphs = ctx.plan.method, [graph for _, graph in ctx.program.distinct_graphs()]
    found = [site for graph in graphs for site in sites(graph, spec.name)]
    tests = {
        f"there is no compact {spec.op} kernel": spec.op not in kernel.TRAINING,
        "it is stored transposed": spec.transposed,
        f"it is tied to {', '.join(spec.aliases)}": bool(spec.aliases),
        "an op reads only a part of it": any(site.sliced for site in found),
        "the graph computes an argument of its convolution": any(
            given_arguments(site.node, CONVOLUTION) is None for site in found if site.op != "linear"
        ),
        f"something other than a {'linear op' if spec.op == 'linear' else 'convolution'} reads it": any(
            _other_users(graph, spec.name, found) for graph in graphs
        ),
        "the module walk does not see who else reads it": ctx.program.tier == "walk",
        f"{method.name} keeps weights behind its zeros": not method.reparam.exact_zeros,
        f"{method.name} changes its count of nonzeros": method.schedule is not None
        and method.schedule.ramp is not None,
        f"{method.name} ranks all weights together, so that their counts drift": method.is_joint,
        f"{method.name} keeps tensors beside its weights, or adds to their gradients": bool(method.extras)
        or method.penalty is not None
        or method.keeps_state,
        f"{decision.pattern} chooses over the whole weight": not decision.pattern.streams,
    }
    return [reason for reason, applies in tests.items() if applies]


def _kernel_refusals(gm: GraphModule, spec: WeightSpec, decision: Decision, ctx: PassContext) -> list[str]:
    """Why only the kernel's PyTorch reference could run."""
    device, in_blocks = _device(gm, spec.name, ctx), bsr.side_of(decision.pattern) is not None
    op = "linear" if spec.op == "linear" else "conv2d"
    problem = Problem(op, spec.shape, 1, decision.nnz, spec.dtype, device, True, is_blocked=in_blocks)
    return kernel.trained_by(spec.op, device, in_blocks).refuses(problem)


def _device(gm: GraphModule, name: str, ctx: PassContext) -> torch.device:
    """Where the weight will train."""
    weight = fetch(gm, name)
    return ctx.device if weight.is_meta else weight.device


def _other_users(gm: GraphModule, name: str, found: list[Site]) -> bool:
    readers = {site.node for site in found}
    return any(user not in readers for node in attribute_nodes(gm.graph, name) for user in node.users)


def _measure(gm: GraphModule, name: str, decision: Decision, ctx: PassContext) -> choosing.Choice | None:
    """The measured choice at the example shapes; None without example inputs."""
    found = sites(gm, name)
    given = argument(found[0].node, 0, "input") if found else None
    value = given.meta.get("val") if isinstance(given, Node) else None
    result = found[0].node.meta.get("val") if found else None
    weight = fetch(gm, name).detach()
    if value is None or result is None or weight.is_meta or ctx.example_inputs is None:
        return None
    shape = [example_size(size, gm) for size in value.shape]
    batch = [example_size(size, gm) for size in result.shape]
    if None in shape or None in batch:
        return None
    arguments = site_arguments(found[0], weight.shape)
    del batch[-1 if found[0].op == "linear" else 1 - weight.dim()]  # what is left counts outputs of one row
    side = bsr.side_of(decision.pattern)
    problem = Problem(
        "linear" if found[0].op == "linear" else "conv2d",
        tuple(weight.shape),
        torch.Size(batch).numel(),
        decision.nnz,
        weight.dtype,
        weight.device,
        training=True,
        arguments=tuple(arguments.items()),
        is_blocked=side is not None,
        side=side,
    )
    generator = torch.Generator(weight.device).manual_seed(0)
    score = torch.rand(weight.shape, generator=generator, device=weight.device)
    # No value is 0, which would be a hole for a kernel that looks for blocks.
    values = torch.randn(weight.shape, generator=generator, device=weight.device).to(weight.dtype)
    values.masked_fill_(values == 0, 1)
    sample = torch.where(decision.pattern.project(score, decision.nnz), values, 0)
    if found[0].op == "linear":
        shape = [problem.batch, shape[-1]]
    x = torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype)
    return choosing.choose(problem, x, sample, bias_of(gm, found[0]))
