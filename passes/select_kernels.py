"""Pick the kernel of every sparse weight by measurement on the inputs that its call sites really get."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxsparse import choosing, kernel
from fxsparse.choosing import Choice
from fxsparse.formats import condensed, nm, strided
from fxsparse.graph import (
    CONVOLUTION,
    Site,
    argument,
    attribute_nodes,
    bias_of,
    fetch,
    given_arguments,
    site_arguments,
    sites,
)
from fxsparse.kernel import Entries, Kernel, Problem
from fxsparse.passes.fuse_epilogue import fused_activation
from fxsparse.pattern import Block
from fxsparse.pipeline import Decision, PassContext, WeightSpec
from fxsparse.skeleton import bind
from fxsparse.verify import copied_inputs, frozen_state

ADVANTAGE = 0.95
"""A sparse kernel is taken where it needs at most this share of the time of the best dense one."""

OPS = {"linear": "linear op", "conv1d": "convolution", "conv2d": "convolution"}
"""The ops that have sparse kernels, and what to call them."""


@dataclass(frozen=True)
class SelectKernels:
    """Fill ``format``, ``kernel``, ``reason``, ``dense_us`` and ``sparse_us`` of every decision.

    `keep_dense`: {weight: reason} for weights that get the fastest dense kernel, as those without zeros do.  A weight
    with several call sites gets the one kernel that is fastest over all of them.
    """

    keep_dense: Mapping[str, str] = field(default_factory=dict, hash=False)
    name: ClassVar[str] = "select-kernels"
    after: ClassVar[tuple[str, ...]] = ("detect-pattern",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Changes no graph, so it returns 0."""
        measured: dict[str, list[Site]] = {}
        recalled = 0
        for name, decision in ctx.decisions.items():
            if name in ctx.entries:
                continue  # of select-entry-kernels
            found = sites(gm, name)
            refusal = _refusal(gm, ctx, ctx.weights[name], found)
            decision.storage = decision.format = decision.kernel = "dense"
            decision.reason = self._why_dense(name, ctx) or refusal or ""
            if refusal is None:
                measured[name] = found
        inputs = site_inputs(gm, ctx, [site.node for found in measured.values() for site in found])
        for name, found in measured.items():
            decision = ctx.decisions[name]
            blocked = isinstance(decision.pattern, Block)
            allowed, why_not = narrower(ctx, ctx.weights[name], fetch(gm, name))
            problems = [
                site_problem(site, matrix_of(gm, site), inputs[site.node], decision.nnz, blocked, allowed)
                for site in found
            ]
            choices = [
                choose_at(gm, site, problem, matrix_of(gm, site), inputs[site.node])
                for site, problem in zip(found, problems, strict=True)
            ]
            why_dense = self._why_dense(name, ctx)
            taken = _decide(decision, choices, why_dense)
            decision.reason += why_not if why_dense is None else ""
            decision.limit_us = sum(choosing.limit_us(taken, problem) for problem in problems)
            recalled += all(choice.recalled for choice in choices)
        if recalled:
            ctx.notes.append(f"{recalled} of {len(measured)} weights were measured by an earlier process")
        return 0

    def _why_dense(self, name: str, ctx: PassContext) -> str | None:
        """Why only dense kernels are looked at."""
        spec = ctx.weights[name]
        full = ctx.decisions[name].nnz == spec.numel and not _is_depthwise(spec)
        return self.keep_dense.get(name) or ("it has no zeros" if full else None)


def site_inputs(gm: GraphModule, ctx: PassContext, nodes: list[Node]) -> dict[Node, Tensor]:
    """The first argument of every given node when the graph runs on the example inputs."""
    found = call_inputs(gm, ctx, {node: node.args[:1] for node in nodes})
    return {node: values[0] for node, values in found.items()}


def call_inputs(
    gm: GraphModule, ctx: PassContext, wanted: Mapping[Node, tuple[Any, ...]]
) -> dict[Node, tuple[Tensor, ...]]:
    """The tensors that some arguments of each node are when the graph runs on the example inputs and calls it."""
    if not wanted:
        return {}
    graph, seen = copy.deepcopy(gm.graph), _Seen({})
    named = {node.name: node for node in graph.nodes}
    _run_on_entries(gm, graph, ctx)
    for node, arguments in wanted.items():
        copied = named[node.name]
        with graph.inserting_before(copied):
            graph.call_function(seen.keep, (copied.name, *map_arg(arguments, lambda n: named[n.name])))
    args, kwargs = copied_inputs(ctx.example_inputs)
    with frozen_state(ctx.program.skeleton, training=False), torch.no_grad():
        bind(graph, ctx.program.skeleton)(*args, **kwargs)
    return {node: seen.inputs[node.name] for node in wanted}


def _run_on_entries(gm: GraphModule, graph: Graph, ctx: PassContext) -> None:
    """Let ops of a copied `graph` on weights that are on meta be kernels on their nonzeros."""
    named = {node.name: node for node in graph.nodes}
    for name, entries in ctx.entries.items():
        entry = kernel.trained_by(ctx.weights[name].op, entries.values.device)
        buffers = tuple(kernel.packed(entry, entries).values())
        for site in sites(gm, name):
            node = named[site.node.name]
            node.target = _Stored(entry, buffers, site_arguments(site, entries.shape)).run
            node.args, node.kwargs = (node.args[0], argument(node, 2, "bias")), {}


@dataclass(frozen=True)
class _Stored:
    kernel: Kernel
    buffers: tuple[Tensor, ...]
    arguments: dict[str, Any]

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.kernel.run(x, bias, *self.buffers, **self.arguments)


def outputs_of_a_row(site: Site, x: Tensor, shape: Sequence[int]) -> int:
    """How many numbers a call site computes with one row of a weight of `shape`: tokens, or output pixels."""
    op, arguments = site.node.target, site_arguments(site, shape)
    for name in kernel.OF_THE_WEIGHT:
        arguments.pop(name, None)
    weight = torch.empty(1, *shape[1:], device="meta", dtype=x.dtype).expand(shape)
    assert callable(op)
    return op(x.to("meta"), weight, **arguments).numel() // max(1, shape[0])


@dataclass(frozen=True)
class _Seen:
    inputs: dict[str, tuple[Tensor, ...]]

    def keep(self, name: str, *values: Tensor) -> None:
        # Copies: the model may change its activations in place further down.
        self.inputs[name] = tuple(value.detach().clone() for value in values)


def _refusal(gm: GraphModule, ctx: PassContext, spec: WeightSpec, found: list[Site]) -> str | None:
    """Why a weight stays as it is without being measured; None if it is to be measured."""
    if spec.op not in OPS:
        return f"there is no sparse {spec.op} kernel"
    if any(site.sliced for site in found):
        return "an op reads only a part of it"
    if len({site.transposed for site in found}) > 1:
        return "it is read both as it is and transposed"
    if any(site.op != "linear" and given_arguments(site.node, CONVOLUTION) is None for site in found):
        return "the graph computes an argument of its convolution"
    known = {site.node for site in found}
    if any(reader not in known for node in attribute_nodes(gm.graph, spec.name) for reader in _readers(node)):
        return f"something other than a {OPS[spec.op]} reads it"
    if len({site.op for site in found}) > 1:
        return "different ops read it"
    if ctx.program.tier == "walk":
        return "the model's own forward runs, since no graph of it could be captured"
    if ctx.example_inputs is None:
        return "not measured: there are no example inputs"
    return None


def _is_depthwise(spec: WeightSpec) -> bool:
    """Whether it has a kernel that is not for zeros."""
    return spec.op in ("conv1d", "conv2d") and spec.shape[1] == 1 and spec.groups == spec.shape[0]


def _readers(node: Node) -> list[Node]:
    """The nodes that read a weight, looking through transposes of it."""
    direct = list(node.users)
    return [r for user in direct for r in (list(user.users) if _is_transpose(user, node) else [user])]


def _is_transpose(user: Node, node: Node) -> bool:
    return user.args == (node,) and user.target in (torch.t, "t", torch.ops.aten.t.default)


def narrower(ctx: PassContext, spec: WeightSpec, values: Tensor) -> tuple[torch.dtype | None, str]:
    """What the values of a weight may be stored in, too; where that is nothing though it was asked for, also why."""
    if ctx.values_dtype is None:
        return None, ""
    name = str(ctx.values_dtype).removeprefix("torch.")
    reasons = {
        f"no {spec.op} kernel stores {name}": spec.op != "linear",
        f"some are not finite, so that {name} cannot scale them": not bool(values.isfinite().all()),
    }
    why = [reason for reason, holds in reasons.items() if holds]
    return (None, f"; values stay {str(spec.dtype)[6:]}: {why[0]}") if why else (ctx.values_dtype, "")


def site_problem(
    site: Site,
    weight: Tensor,
    x: Tensor,
    nnz: int,
    is_blocked: bool = False,
    values: torch.dtype | None = None,
) -> Problem:
    """What a kernel has to do at a call site, for a `weight` [out, in, ...] with so many entries."""
    return Problem(
        "linear" if site.op == "linear" else "conv2d",
        tuple(weight.shape),
        outputs_of_a_row(site, x, weight.shape),
        nnz,
        weight.dtype,
        weight.device,
        training=False,
        fan_in=condensed.fan_in(weight.flatten(1) != 0),
        arguments=tuple(site_arguments(site, weight.shape).items()),
        is_blocked=is_blocked,
        values=values,
        group=nm.group_of(weight != 0) if weight.dim() == 2 else None,
        strides=strided.strides_of(weight != 0) if weight.dim() == 2 else None,
    )


def choose_at(gm: GraphModule, site: Site, problem: Problem, weight: Tensor | Entries, x: Tensor) -> Choice:
    """Measure the kernels with the bias and the activation of the call site."""
    activation = fused_activation(gm, site.node)
    return choosing.choose(problem, x, weight, bias_of(gm, site), activation, advantage=ADVANTAGE)


def matrix_of(gm: GraphModule, site: Site) -> Tensor:
    """The weight as the op reads it, [out, in]."""
    weight = fetch(gm, str(site.weight.target)).detach()
    return weight.t().contiguous() if site.transposed else weight


def _decide(decision: Decision, choices: list[Choice], why_dense: str | None) -> Kernel:
    """Write and return the kernel that is fastest over all call sites; a sparse one must beat dense by `ADVANTAGE`."""
    entries, calls = kernel.registered(), f"its {len(choices)} call sites"
    names = set.intersection(*(set(choice.times_us) for choice in choices))
    total = {name: sum(choice.times_us[name] for choice in choices) for name in names}
    dense = {name: us for name, us in total.items() if entries[name].format == "dense"}
    exact = {name: us for name, us in total.items() if name not in dense and entries[name].values is None}
    best_dense = min(dense, key=dense.__getitem__, default="dense")
    taken = best_dense if why_dense or not total else choosing.taken_of(total, ADVANTAGE)[0]
    decision.dense_us = min(dense.values(), default=None)
    decision.sparse_us = total[taken] if entries[taken].values else min(exact.values(), default=None)
    is_dense = entries[taken].format == "dense"
    decision.kernel = "dense" if taken in kernel.PLAIN else taken
    if why_dense is None and len(choices) == 1:
        decision.reason = choices[0].reason
    elif why_dense is None and is_dense:
        decision.reason = f"no sparse kernel is faster over {calls}"
    elif why_dense is None:
        decision.reason = f"{taken} {total[taken]:.1f} us over {calls}"
    if not is_dense:
        decision.storage, decision.format = "compact", entries[taken].format
        decision.values_dtype = entries[taken].values
    return entries[taken]
