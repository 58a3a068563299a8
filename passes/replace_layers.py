"""Put Sparse-IFT's parallel branches, factors or doped pairs in the place of single layers."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxsparse.errors import InvariantError, PlanError
from fxsparse.fresh_values import drawn_like
from fxsparse.globs import matches, unmatched
from fxsparse.graph import CONVOLUTION, Site, argument, fetch, given_arguments, owner, readers, sites
from fxsparse.pipeline import PassContext, Transformed
from fxsparse.transforms import SparseDoped, SparseFactorized, SparseParallel, SparseWide
from fxsparse.transforms.iso_flop import doped_rank, factorized_rank

_LAYERS: dict[int, Any] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_NORMS: dict[int, Any] = {2: nn.LayerNorm, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class Place:
    """Where a layer is, and what it does."""

    weight: str
    path: str
    """Where what replaces it is registered."""
    given: Tensor
    """Its weight as [out, in, kernel ...]."""
    bias: Tensor | None
    options: Mapping[str, Any]
    """Stride, padding and dilation of a convolution."""
    seed: int
    norm: nn.Module | None = None
    """The BatchNorm that alone reads what the layer makes, at all its calls."""


@dataclass(frozen=True)
class ReplaceLayers:
    """Every layer of ``ctx.transformed.layers`` becomes modules of its own, registered under its name.

    Sparse Parallel: ``<layer>.branches.0.weight`` and so on; Sparse Factorized: ``<layer>.u.weight`` and
    ``<layer>.v.weight``; Sparse Doped: the layer's own weight, and ``u`` and ``v`` below it (arXiv:2303.11525).  Stride
    and padding are those of the layer for U, and V is 1 x 1.  A bias that a norm follows is left out.  First values are
    drawn from those of the weight that was there (`fxsparse.fresh_values`), times the root of fan-in before / after.
    """

    name: ClassVar[str] = "replace-layers"
    after: ClassVar[tuple[str, ...]] = ("choose-layers",)
    preserves_function: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Rewrites the graphs of both modes at once; returns the number of calls that were replaced."""
        found, plan = ctx.transformed, ctx.plan
        if found is None or plan is None:
            raise InvariantError("replace-layers runs after choose-layers, with a plan")
        if found.sparse:
            return 0
        graphs = [graph for _, graph in ctx.program.distinct_graphs()]
        rewrites = 0
        keep = () if isinstance(plan.transform, SparseWide) or plan.transform is None else plan.transform.keep
        _check_globs(keep, found.layers, type(plan.transform).__name__)
        for name in found.layers:
            if any(matches(glob, name) for glob in keep):
                found.sparse.append(name)
                continue
            calls = [(graph, site) for graph in graphs for site in sites(graph, name)]
            place = _place(calls[0][0], calls[0][1], plan.seed)
            if isinstance(plan.transform, SparseParallel) and "norm" in plan.transform.sigma:
                place = replace(place, norm=_norm_behind(calls))
            call = _REPLACE[type(plan.transform)](ctx, place)
            names = [name, *(_bias_name(site) for _, site in calls)]
            for _, site in calls:
                _put(site.node, call, with_norm=place.norm is not None)
            rewrites += len(calls)
            _forget(graphs, names)
            if place.norm is not None:
                _drop(ctx.program.skeleton, place.norm)
        for graph in graphs:
            graph.recompile()
        return rewrites


Call = Callable[[Node], Node]
"""Puts what replaces a call behind it, and returns its result."""


def _place(gm: GraphModule, site: Site, seed: int) -> Place:
    name = str(site.weight.target)
    module, last = owner(gm, name)
    above = name.rpartition(".")[0]
    if last == "weight" and set(dict(module.named_parameters())) <= {"weight", "bias"}:
        path = above
    else:
        leaf = last.removesuffix("weight").strip("_") or "layer"
        path = ".".join(part for part in (above, f"{leaf}_layer" if hasattr(module, leaf) else leaf) if part)
    given = fetch(gm, name)
    bias = _bias_name(site)
    options = {} if site.op == "linear" else given_arguments(site.node, CONVOLUTION[:3]) or {}
    with_bias = None if bias is None else fetch(gm, bias)
    return Place(name, path, given.t() if site.transposed else given, with_bias, options, seed)


def _bias_name(site: Site) -> str | None:
    bias = argument(site.node, 2, "bias")
    return str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else None


# -- the three replacements --------------------------------------------------------------------------------


def _parallel(ctx: PassContext, place: Place) -> Call:
    """``sum_j sigma(theta_j z)``."""
    transform, found, sparsity = _wanted(ctx, SparseParallel)
    root = ctx.program.skeleton
    count, has_norm = transform.branches(sparsity), "norm" in transform.sigma
    layer, outputs = nn.Module(), place.given.shape[0]
    layer.branches = nn.ModuleList()
    layer.norms = nn.ModuleList([_norm(place, outputs) for _ in range(count if has_norm else 0)])
    for k in range(count):
        name = f"{place.path}.branches.{k}"
        layer.branches.append(_layer(place, name, tuple(place.given.shape), place.options, bias=not has_norm))
        found.sparse.append(f"{name}.weight")
    _register(root, place.path, layer)

    def call(node: Node) -> Node:
        graph, x, total = node.graph, argument(node, 0, "input"), None
        for k in range(count):
            branch = _sigma(
                graph.call_module(f"{place.path}.branches.{k}", (x,)),
                transform.sigma,
                f"{place.path}.norms.{k}",
            )
            total = branch if total is None else graph.call_function(torch.add, (total, branch))
        assert total is not None
        return total

    return call


def _factorized(ctx: PassContext, place: Place) -> Call:
    """``V sigma(U z)``."""
    transform, found, sparsity = _wanted(ctx, SparseFactorized)
    root = ctx.program.skeleton
    outputs, inputs = place.given.shape[0], place.given[0].numel()
    rank = factorized_rank(inputs, outputs, sparsity)
    layer = _factors(
        place, rank, bias_of_u="norm" not in transform.sigma and transform.sigma != "none", bias_of_v=True
    )
    if "norm" in transform.sigma:
        layer.norm = _norm(place, rank)
    found.sparse += [f"{place.path}.u.weight", f"{place.path}.v.weight"]
    _register(root, place.path, layer)

    def call(node: Node) -> Node:
        inner = node.graph.call_module(f"{place.path}.u", (argument(node, 0, "input"),))
        return node.graph.call_module(
            f"{place.path}.v", (_sigma(inner, transform.sigma, f"{place.path}.norm"),)
        )

    return call


def _doped(ctx: PassContext, place: Place) -> Call:
    """``V U z + sigma(theta z)``; a rank of 0 leaves theta alone."""
    transform, found, sparsity = _wanted(ctx, SparseDoped)
    root = ctx.program.skeleton
    outputs, inputs = place.given.shape[0], place.given[0].numel()
    rank, has_norm = doped_rank(inputs, outputs, sparsity), "norm" in transform.sigma
    layer = _factors(place, rank, bias_of_u=False, bias_of_v=False) if rank else nn.Module()
    theta = _layer(place, place.path, tuple(place.given.shape), place.options, bias=not has_norm)
    own = place.given.detach().clone(memory_format=torch.contiguous_format)
    theta.weight = nn.Parameter(own, place.given.requires_grad)
    for name, part in layer.named_children():
        theta.add_module(name, part)
    if has_norm:
        theta.norm = _norm(place, outputs)
    found.sparse.append(f"{place.path}.weight")
    names = [f"{place.path}.u.weight", f"{place.path}.v.weight"] if rank else []
    if transform.low_rank == "dense":
        found.low_rank += names
        found.dense |= dict.fromkeys(names, "Sparse-IFT leaves it dense: it is of low rank")
    else:
        found.sparse += names
    _register(root, place.path, theta)

    def call(node: Node) -> Node:
        graph, x = node.graph, argument(node, 0, "input")
        out = _sigma(graph.call_module(place.path, (x,)), transform.sigma, f"{place.path}.norm")
        if not rank:
            return out
        inner = graph.call_module(f"{place.path}.u", (x,))
        return graph.call_function(torch.add, (out, graph.call_module(f"{place.path}.v", (inner,))))

    return call


_REPLACE: dict[Any, Callable[[PassContext, Place], Call]] = {
    SparseParallel: _parallel,
    SparseFactorized: _factorized,
    SparseDoped: _doped,
}


# -- parts --------------------------------------------------------------------------------------------------


def _wanted(ctx: PassContext, kind: Any) -> tuple[Any, Transformed, float]:
    """(the plan's transformation, what it found and made so far, its nominal sparsity)."""
    plan, found = ctx.plan, ctx.transformed
    if plan is None or found is None or plan.sparsity is None or not isinstance(plan.transform, kind):
        raise InvariantError(f"{kind.__name__} is carried out by a plan that has it")
    return plan.transform, found, plan.sparsity


def _factors(place: Place, rank: int, *, bias_of_u: bool, bias_of_v: bool) -> nn.Module:
    """A module with ``u``, which has the kernel of the layer, and ``v``, which has none."""
    out, *read = place.given.shape
    ones = [1] * (place.given.dim() - 2)
    layer = nn.Module()
    layer.u = _layer(place, f"{place.path}.u", (rank, *read), place.options, bias=bias_of_u)
    layer.v = _layer(place, f"{place.path}.v", (out, rank, *ones), {}, bias=bias_of_v)
    return layer


def _layer(place: Place, name: str, shape: tuple[int, ...], options: Mapping[str, Any], *, bias: bool) -> Any:
    """A Linear or Conv with a weight of `shape`, and a bias where the layer had one and `bias` says so."""
    out, read, *kernel = shape
    given = place.given
    with_bias = bias and place.bias is not None
    made = {"bias": with_bias, "device": given.device, "dtype": given.dtype}
    layer = _LAYERS[given.dim()](read, out, *([tuple(kernel)] if kernel else []), **options, **made)
    fan_in, before = torch.Size(shape[1:]).numel(), given[0].numel()
    values = drawn_like(given, shape, (before / fan_in) ** 0.5, place.seed, f"{name}.weight")
    if given.is_meta or bool((values != 0).any()):  # two factors of zeros would never learn
        layer.weight = nn.Parameter(values, given.requires_grad)
    if place.bias is not None and with_bias:
        start = drawn_like(place.bias, (out,), 1.0, place.seed, f"{name}.bias")
        layer.bias = nn.Parameter(start, place.bias.requires_grad)
    return layer


def _norm(place: Place, channels: int) -> nn.Module:
    """A copy of the norm that was there, else BatchNorm behind a convolution and LayerNorm behind a linear layer."""
    if place.norm is not None:
        return copy.deepcopy(place.norm)
    return _NORMS[place.given.dim()](channels, device=place.given.device, dtype=place.given.dtype)


def _sigma(x: Node, words: str, norm: str) -> Node:
    if "norm" in words:
        x = x.graph.call_module(norm, (x,))
    return x.graph.call_function(F.relu, (x,)) if "relu" in words else x


def _register(root: nn.Module, path: str, layer: nn.Module) -> None:
    parent, last = owner(root, path)
    layer.train(root.training)
    parent._modules[last] = layer


def _put(node: Node, call: Call, *, with_norm: bool) -> None:
    """The result of `call` in the place of a call; `with_norm`: of the norm behind it too."""
    with node.graph.inserting_before(node):
        new = call(node)
    gone = [*node.users, node] if with_norm else [node]
    gone[0].replace_all_uses_with(new)
    for old in gone:
        node.graph.erase_node(old)


def _norm_behind(calls: list[tuple[GraphModule, Site]]) -> nn.Module | None:
    """The BatchNorm module that alone reads a layer, at each of its calls; none that does more (BatchNormAct2d)."""
    found: set[str | None] = set()
    for _, site in calls:
        users = [user for user in site.node.users if user.op == "call_module"]
        alone = len(users) == len(site.node.users) == 1
        found.add(str(users[0].target) if alone else None)
    path = found.pop()
    norm = None if path is None or found else calls[0][0].get_submodule(path)
    return norm if isinstance(norm, _BatchNorm) and not list(norm.children()) else None


def _drop(root: nn.Module, norm: nn.Module) -> None:
    """Leave nothing in the place of a norm whose copies are in the branches."""
    for module in root.modules():
        for name, child in module._modules.items():
            if child is norm:
                module._modules[name] = nn.Identity()


def _check_globs(keep: Sequence[str], layers: Sequence[str], transform: str) -> None:
    lost = unmatched(keep, layers)
    if lost:
        raise PlanError(
            f"{transform}: keep={lost[0]!r}: expected a glob of layers to transform, it names none of "
            f"{', '.join(layers[:3])}, ..."
        )
    if keep and all(any(matches(glob, name) for glob in keep) for name in layers):
        raise PlanError(
            f"{transform}: keep={tuple(keep)!r} names every layer there is to transform ({', '.join(layers[:5])}): "
            "expected to keep some of them; take a glob out, or compile without a transform."
        )


def _forget(graphs: list[GraphModule], names: list[str | None]) -> None:
    """Drop parameters that nothing reads any more, and what led to them."""
    for name in dict.fromkeys(name for name in names if name is not None):
        for graph in graphs:
            for node in list(graph.graph.find_nodes(op="get_attr", target=name)):
                for user in [user for user in node.users if not user.users]:
                    graph.graph.erase_node(user)
                if not node.users:
                    graph.graph.erase_node(node)
        path = name.rpartition(".")[0]
        called = any(graph.graph.find_nodes(op="call_module", target=path) for graph in graphs)
        if called or any(readers(graph.graph, name) for graph in graphs):
            continue
        try:
            module, last = owner(graphs[0], name)
        except AttributeError:
            continue  # it went with the module whose place was taken
        module._parameters.pop(last, None)
