"""Decide which parameters may become sparse, and say why the others may not."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils import parametrize, prune

from fxsparse.errors import PlanError
from fxsparse.globs import matches, unmatched
from fxsparse.graph import (
    Site,
    argument,
    attribute_nodes,
    canonical_names,
    fetch,
    has_sparse_layout,
    operation_name,
    owner,
    sites,
)
from fxsparse.pattern import Pattern, Unstructured
from fxsparse.pipeline import PassContext, WeightSpec
from fxsparse.plans import Plan

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class CollectWeights:
    """Fill ``ctx.weights`` and ``ctx.untouched``: every parameter of the model is in exactly one of them.

    Raises PlanError for an `exclude` glob that matches no parameter and an override that matches no selected
    weight.
    """

    name: ClassVar[str] = "collect-weights"
    after: ClassVar[tuple[str, ...]] = ("functionalize",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Look at all graphs of the program; changes none, so it returns 0."""
        if ctx.weights or ctx.untouched:
            return 0  # the other mode's graph was looked at together with the first
        skeleton, plan = ctx.program.skeleton, ctx.plan
        aliases: dict[str, list[str]] = {}
        for alias, name in canonical_names(skeleton).items():
            aliases.setdefault(name, []).append(alias)
        _check_globs("exclude", plan.exclude if plan else (), canonical_names(skeleton))
        graphs = [graph for _, graph in ctx.program.distinct_graphs()]
        for name, names in aliases.items():
            found = [site for graph in graphs for site in sites(graph, name)]
            reason = _refusal(ctx, name, names, found, graphs)
            glob = _excluding(plan, names) if reason is None else None
            if glob is not None:
                reason = f"excluded by {glob!r}"
            if reason is not None:
                ctx.untouched[name] = reason
            if reason is None or glob is not None:
                chosen = ctx.weights if glob is None else ctx.excluded
                chosen[name] = _spec(fetch(skeleton, name), name, names, found)
        _check_globs("overrides", [o.glob for o in plan.overrides] if plan else (), ctx.weights)
        return 0


def _refusal(
    ctx: PassContext, name: str, names: list[str], found: list[Site], graphs: list[GraphModule]
) -> str | None:
    skeleton = ctx.program.skeleton
    for alias in names:
        module, last = owner(skeleton, alias)
        if isinstance(module, _EMBEDDINGS):
            return "embedding" if len(names) == 1 else f"tied to the embedding {alias!r}"
        if isinstance(module, _NORMS) or ("norm" in type(module).__name__.lower() and not found):
            return "norm"
        if last.endswith("bias"):
            return "bias"
    if any(_is_embedding_table(node) for graph in graphs for node in attribute_nodes(graph.graph, name)):
        return "tied to an embedding" if found else "embedding"
    if name in ctx.program.dense:
        return ctx.program.dense[name]
    if not found:
        return _why_no_site(ctx, name, names, fetch(skeleton, name), graphs)
    if not fetch(skeleton, name).numel():
        return "it has no entries"
    inputs = [argument(site.node, 0, "input") for site in found]
    if any(has_sparse_layout(x.meta.get("val")) for x in inputs if isinstance(x, Node)):
        return "its input is of a sparse layout of PyTorch, which has products of its own"
    other = next(
        (alias for alias in names if owner(skeleton, alias)[0] is not owner(skeleton, name)[0]), None
    )
    if ctx.program.tier == "walk" and other is not None:
        return f"tied to {other!r}: the module walk masks a weight in one module only"
    if (
        found[0].op.startswith("conv_transpose")
        and ctx.plan
        and not isinstance(_pattern(ctx.plan, names), Unstructured)
    ):
        return f"{found[0].op} stores input channels first; only Unstructured() fits it"
    if len({site.op for site in found}) > 1 or len({site.transposed for site in found}) > 1:
        return f"used in different ways: {sorted({site.op for site in found})}"
    return None


def _why_no_site(
    ctx: PassContext, name: str, names: list[str], parameter: torch.Tensor, graphs: list[GraphModule]
) -> str:
    hidden = next((ctx.program.hidden[alias] for alias in names if alias in ctx.program.hidden), None)
    if hidden is not None:
        return f"hidden: {hidden}"
    users = {user for graph in graphs for node in attribute_nodes(graph.graph, name) for user in node.users}
    if not users:
        return _why_unread(ctx, name, graphs)
    ops = ", ".join(sorted({operation_name(user) for user in users}))
    if parameter.dim() == 3 and any(word in ops for word in ("mm", "matmul", "einsum")):
        return f"3-D expert weight (op {ops})"
    return f"its op is neither a linear nor a convolution ({ops})"


def _why_unread(ctx: PassContext, name: str, graphs: list[GraphModule]) -> str:
    if ctx.program.tier == "walk":
        return "not the weight of a plain linear or convolution, as far as the module walk sees"
    called = {str(node.target) for graph in graphs for node in graph.graph.find_nodes(op="call_module")}
    inside = next((path for path in sorted(called) if name.startswith(f"{path}.")), None)
    if inside is None:
        return "not read by the forward pass"
    module = ctx.program.skeleton.get_submodule(inside)
    if parametrize.is_parametrized(module):
        return (
            f"{inside} computes it by a parametrization at every call; "
            "torch.nn.utils.parametrize.remove_parametrizations makes it a Parameter again"
        )
    if prune.is_pruned(module):
        return (
            f"{inside} multiplies it by a mask of torch.nn.utils.prune at every call; torch.nn.utils.prune.remove "
            "makes it a Parameter again, whose zeros a plan can keep"
        )
    kind = type(module).__name__
    return f"inside {inside} ({kind}), which runs as one module"


def _is_embedding_table(node: Node) -> bool:
    table_first = (torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.default)
    return any(
        (user.target in table_first and user.args[0] is node)
        or (
            user.target in (torch.embedding, nn.functional.embedding)
            and node in (argument(user, 1, "weight"), user.args[0])
        )
        for user in node.users
    )


def _excluding(plan: Plan | None, names: list[str]) -> str | None:
    """The first glob of `exclude` that names the weight by any of its names."""
    globs = plan.exclude if plan else ()
    return next((glob for glob in globs if any(matches(glob, name) for name in names)), None)


def _pattern(plan: Plan, names: list[str]) -> Pattern:
    """The pattern that the weight would get: of the first override that names it, else the plan's."""
    wish = next((o for o in plan.overrides if any(matches(o.glob, name) for name in names)), None)
    return plan.pattern if wish is None or wish.pattern is None else wish.pattern


def _spec(parameter: torch.Tensor, name: str, names: list[str], found: list[Site]) -> WeightSpec:
    return WeightSpec(
        name=name,
        op=found[0].op,
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        transposed=found[0].transposed,
        aliases=tuple(alias for alias in names if alias != name),
        groups=_groups(found[0]),
        trains=parameter.requires_grad,
    )


def _groups(site: Site) -> int:
    if site.op == "linear":
        return 1
    groups = argument(site.node, 6, "groups") or 1
    return int(groups)


def _check_globs(field: str, globs: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    lost = unmatched(globs, names)
    if not lost:
        return
    prefixes = {".".join(name.split(".")[:k]) for name in names for k in range(1, name.count(".") + 2)}
    near = difflib.get_close_matches(lost[0], sorted(prefixes), n=3, cutoff=0.3) or sorted(prefixes)[:3]
    what = "parameter" if field == "exclude" else "selected weight"
    raise PlanError(
        f"{field} glob {lost[0]!r} matches no {what}; nearest names: {near}. A glob matches "
        "full names, or a module above them"
    )
