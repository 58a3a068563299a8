"""Decide which parameters may become sparse, and say why the others may not."""

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxsparse.errors import PlanError
from fxsparse.graph import (
    Site,
    argument,
    attribute_nodes,
    canonical_names,
    fetch,
    operation_name,
    owner,
    sites,
)
from fxsparse.pattern import Unstructured
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
        _check_globs("exclude", plan.exclude if plan else (), aliases, aliases)
        graphs = [graph for _, graph in ctx.program.distinct_graphs()]
        for name, names in aliases.items():
            found = [site for graph in graphs for site in sites(graph, name)]
            reason = _refusal(ctx, name, names, found, graphs)
            if reason is None:
                ctx.weights[name] = _spec(fetch(skeleton, name), name, names, found)
            else:
                ctx.untouched[name] = reason
        _check_globs("overrides", [o.glob for o in plan.overrides] if plan else (), aliases, ctx.weights)
        return 0


def matches(glob: str, name: str) -> bool:
    """Whether a glob matches a full weight name or one of its module prefixes: ``head`` matches
    ``head.weight``.
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:k]), glob) for k in range(1, len(parts) + 1))


def _refusal(
    ctx: PassContext, name: str, names: list[str], found: list[Site], graphs: list[GraphModule]
) -> str | None:
    skeleton = ctx.program.skeleton
    for alias in names:
        module, last = owner(skeleton, alias)
        if isinstance(module, _EMBEDDINGS):
            return "embedding" if len(names) == 1 else f"tied to the embedding {alias!r}"
        if isinstance(module, _NORMS):
            return "norm"
        if last.endswith("bias"):
            return "bias"
    if any(_is_embedding_table(node) for graph in graphs for node in attribute_nodes(graph.graph, name)):
        return "tied to an embedding" if found else "embedding"
    if not found:
        return _why_no_site(ctx, name, names, fetch(skeleton, name), graphs)
    for glob in ctx.plan.exclude if ctx.plan else ():
        if any(matches(glob, alias) for alias in names):
            return f"excluded by {glob!r}"
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
        return "not a weight of a supported layer, as far as the module walk sees"
    called = {str(node.target) for graph in graphs for node in graph.graph.find_nodes(op="call_module")}
    inside = next((path for path in sorted(called) if name.startswith(f"{path}.")), None)
    if inside is None:
        return "not read by the forward pass"
    kind = type(ctx.program.skeleton.get_submodule(inside)).__name__
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


def _pattern(plan: Plan, names: list[str]) -> Any:
    chosen = [o.pattern for o in plan.overrides if o.pattern and any(matches(o.glob, name) for name in names)]
    return chosen[-1] if chosen else plan.pattern


def _spec(parameter: torch.Tensor, name: str, names: list[str], found: list[Site]) -> WeightSpec:
    return WeightSpec(
        name=name,
        op=found[0].op,
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        transposed=found[0].transposed,
        aliases=tuple(alias for alias in names if alias != name),
        groups=_groups(found[0]),
    )


def _groups(site: Site) -> int:
    if site.op == "linear":
        return 1
    groups = argument(site.node, 6, "groups") or 1
    return int(groups)


def _check_globs(field: str, globs: Any, names: Any, targets: Any) -> None:
    known = list(targets) if field == "overrides" else [alias for group in names.values() for alias in group]
    prefixes = sorted(
        {name.rsplit(".", k)[0] for name in known for k in range(name.count(".") + 1)} | set(known)
    )
    for glob in globs:
        if any(matches(glob, name) for name in known):
            continue
        near = difflib.get_close_matches(glob, prefixes, n=3, cutoff=0.3)
        what = "parameter" if field == "exclude" else "selected weight"
        raise PlanError(f"{field} glob {glob!r} matches no {what}; nearest names: {near or prefixes[:3]}")
