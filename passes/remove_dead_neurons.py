"""Take neurons out of the model that compute nothing: rows of zeros, and outputs that nobody reads."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse.channels.constants import evaluate, flat, pads, wide
from fxsparse.channels.dead import Merge, Removal, plan_removal, weight_name, weight_of, why_rows_stay
from fxsparse.channels.dependency import Axis, Contraction
from fxsparse.channels.rules import shape_arguments
from fxsparse.flops import count_program
from fxsparse.graph import argument, fetch, operand_of, owner, sites
from fxsparse.inputs import has_meta
from fxsparse.packed import replace_buffer, replace_parameter, set_bias
from fxsparse.pipeline import PassContext, Shrunk


@dataclass(frozen=True)
class RemoveDeadNeurons:
    """Rows of a weight without nonzeros go, and with them the columns that read them; constants move to biases.

    A channel goes where every layer that sums over it reads a constant there, or has only zeros there.  The constant,
    act(bias) as the ops between compute it, times the column is added to the reader's bias in fp64 and rounded once; a
    reader without bias gets one.  At its border a convolution with zero padding reads zeros instead: there one of the
    dead rows that it reads stays, and its column takes over those of the others, which is exact everywhere.

    In place change weights, biases, norms' vectors, ``ctx.weights``, and sizes and groups that the graph writes as
    numbers; ``ctx.shrunk`` counts rows.  Repeated until nothing more goes.  Every row of zeros that stays is in a note,
    with the reason.  (Neuron ablation: arXiv:2305.02299, section 3.3.)
    """

    name: ClassVar[str] = "remove-dead-neurons"
    after: ClassVar[tuple[str, ...]] = ("fold-batch-norm", "infer-shapes", "remove-identities", "fold-masks")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of removed rows, over all weights."""
        reason = _refusal(gm, ctx)
        if reason is not None:
            ctx.notes.append(f"no neuron is removed: {reason}")
            return 0
        plan, before = plan_removal(gm), _shapes(gm)
        if plan is not None and plan.gone.any():
            ctx.flops_before = count_program(gm)
        while plan is not None and plan.gone.any():
            _apply(gm, ctx, plan)
            plan = plan_removal(gm)
        ctx.notes += [] if plan is None else _kept(gm, plan)
        after = _shapes(gm)
        for name, (numel, rows) in before.items():
            now, left = after[name]
            if now < numel:
                ctx.shrunk[name] = Shrunk(numel, rows - left)
        return sum(weight.neurons for weight in ctx.shrunk.values())


def _refusal(gm: GraphModule, ctx: PassContext) -> str | None:
    if ctx.program.tier == "walk":
        return "no graph of the model could be captured, so nothing tells who reads them"
    if not any("val" in node.meta for node in gm.graph.nodes):
        return "shapes are unknown"
    if ctx.entries:
        return "weights are stored as their nonzeros, as dense ones would not fit"
    return "the weights are on the meta device" if has_meta(ctx.program.skeleton) else None


# -- taking it out -------------------------------------------------------------------------------------------


def _apply(gm: GraphModule, ctx: PassContext, plan: Removal) -> None:
    shifts = [
        (c, shift) for c in plan.traced.graph.contractions if (shift := _shift(gm, plan, c)) is not None
    ]
    _merge(gm, [merge for merge in plan.merges if plan.gone[merge.channel]])
    for node in list(gm.graph.nodes):
        _rewrite_numbers(gm, plan, node)
    for node in list(gm.graph.nodes):
        _shrink_value(plan, node)
    for name in {axis.value for axis in plan.labels if isinstance(axis.value, str)}:
        _shrink_tensor(gm, plan, name)
    for reader, shift in shifts:
        _add_to_bias(gm, reader, shift)
    _update_specs(gm, ctx)


def _shift(gm: GraphModule, plan: Removal, reader: Contraction) -> Tensor | None:
    """What the columns that go add to the outputs of a layer that stay, in fp64; None where that is nothing."""
    constant = plan.constants.get(reader.input)
    if constant is None or pads(reader.node):
        return None
    gone = torch.from_numpy(plan.gone[plan.labels[reader.input]]).to(constant.known.device)
    gone &= constant.known & (constant.values != 0)
    weight = flat(evaluate(gm, weight_of(reader)))[:, gone]
    if not bool(weight.any()):
        return None
    dtype = wide(weight.dtype)
    shift = weight.sum(2, dtype=dtype) @ constant.values[gone].to(dtype)
    produces = plan.traced.steps[reader.node].produces
    assert produces is not None
    return shift[plan.index(produces, shift)]


def _merge(gm: GraphModule, merges: list[Merge]) -> None:
    """Add columns of weights to others, in fp64, rounded once."""
    for name in dict.fromkeys(weight_name(merge.reader) for merge in merges):
        own = [merge for merge in merges if weight_name(merge.reader) == name]
        weight = (
            fetch(gm, name).detach().clone(memory_format=torch.contiguous_format)
        )  # so that flat() is a view
        into, taken = torch.tensor([(m.into, m.position) for m in own], device=weight.device).t()
        ratios = torch.tensor([m.ratio for m in own], dtype=wide(weight.dtype), device=weight.device)
        changed, which = into.unique(return_inverse=True)
        columns = flat(weight)[:, taken] * ratios[:, None]
        sums = flat(weight)[:, changed].to(ratios.dtype).index_add_(1, which, columns)
        flat(weight)[:, changed] = sums.to(weight.dtype)
        replace_parameter(gm, name, weight)


def _add_to_bias(gm: GraphModule, reader: Contraction, shift: Tensor) -> None:
    bias, weight = argument(reader.node, 2, "bias"), evaluate(gm, weight_of(reader))
    if isinstance(bias, Node):
        shift = shift + fetch(gm, str(bias.target)).detach()
    site = next(site for site in sites(gm) if site.node is reader.node)
    set_bias(gm, site, shift.to(weight.dtype))


def _shrink_tensor(gm: GraphModule, plan: Removal, name: str) -> None:
    old = fetch(gm, name)
    new = old.detach()
    for dim in range(old.dim()):
        axis = Axis(name, dim)
        if axis in plan.labels and not plan.kept(axis).all():
            new = new.index_select(dim, plan.index(axis, new))
    if new.shape == old.shape:
        return
    module, leaf = owner(gm, name)
    if leaf in module._parameters:
        replace_parameter(gm, name, new)
    else:
        replace_buffer(gm, name, new)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(new)


def _shrink_value(plan: Removal, node: Node) -> None:
    """Keep ``meta["val"]`` true; a tuple of pieces by what its readers became."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and node.op != "get_attr":
        shape = list(value.shape)
        for dim in range(len(shape)):
            if Axis(node, dim) in plan.labels:
                shape[dim] = int(plan.kept(Axis(node, dim)).sum())
        if shape != list(value.shape):
            node.meta["val"] = value.new_empty(shape)


def _rewrite_numbers(gm: GraphModule, plan: Removal, node: Node) -> None:
    """Groups of a convolution, sizes of a reshape and of pieces, where the graph writes them down."""
    step, output = plan.traced.steps[node], node.meta.get("val")
    if step.produces is not None and step.contraction is None:
        _rewrite_groups(gm, plan, node)
    sizes = shape_arguments(node)
    if sizes is not None and isinstance(output, Tensor):
        changed = [
            int(plan.kept(axis).sum())
            if isinstance(size, int) and size != -1 and (axis := Axis(node, dim)) in plan.labels
            else size
            for dim, size in enumerate(sizes)
        ]
        if changed != sizes:
            rest = {k: v for k, v in node.kwargs.items() if k not in ("input", "shape", "size")}
            node.args, node.kwargs = (argument(node, 0, "input"), changed), rest
    if (
        isinstance(output, tuple | list)
        and step.silent
        and all(isinstance(piece, Tensor) for piece in output)
    ):
        _rewrite_pieces(plan, node)


def _rewrite_groups(gm: GraphModule, plan: Removal, node: Node) -> None:
    axis = plan.traced.steps[node].produces
    assert axis is not None
    kept, groups = plan.kept(axis), argument(node, 6, "groups")
    left = int(kept.reshape(groups, -1).all(1).sum())
    if left == groups:
        return
    if len(node.args) > 6:
        node.args = (*node.args[:6], left, *node.args[7:])
    else:
        node.kwargs = {**node.kwargs, "groups": left}


def _rewrite_pieces(plan: Removal, node: Node) -> None:
    """Calls of chunk and split become a split into the sizes that are left."""
    x, dim, old = operand_of(node), argument(node, 2, "dim") or 0, node.meta["val"]
    assert isinstance(x, Node)
    dim %= x.meta["val"].dim()
    axis = Axis(x, dim)
    if axis not in plan.labels or plan.kept(axis).all():
        return
    sizes = [piece.shape[dim] for piece in old]
    parts = np.split(plan.kept(axis), np.cumsum(sizes)[:-1])
    left = [int(part.sum()) for part in parts]
    node.op, node.target, node.args, node.kwargs = "call_function", torch.split, (x, left, dim), {}
    shapes = [[*p.shape[:dim], size, *p.shape[dim + 1 :]] for p, size in zip(old, left, strict=True)]
    node.meta["val"] = tuple(piece.new_empty(shape) for piece, shape in zip(old, shapes, strict=True))


def _update_specs(gm: GraphModule, ctx: PassContext) -> None:
    """Keep what is known of parameters true."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(value := fetch(gm, str(node.target)), Tensor):
            node.meta["val"] = value
    for site in sites(gm):
        name = str(site.weight.target)
        if name in ctx.weights:
            groups = 1 if site.op == "linear" else argument(site.node, 6, "groups") or 1
            shape = tuple(fetch(gm, name).shape)
            ctx.weights[name] = replace(ctx.weights[name], shape=shape, groups=groups)


# -- what is said of the rows that stay ----------------------------------------------------------------------


def _kept(gm: GraphModule, plan: Removal) -> list[str]:
    """A note for every weight and reason: how many of its rows are zeros and stay."""
    notes = []
    for site in sites(gm):
        name, reasons = str(site.weight.target), Counter(why_rows_stay(gm, plan, site))
        if reasons:
            parts = "; ".join(f"{count} since {reason}" for reason, count in reasons.most_common())
            notes.append(f"{name}: {reasons.total()} of {len(fetch(gm, name))} rows of zeros stay: {parts}")
    return notes


def _shapes(gm: GraphModule) -> dict[str, tuple[int, int]]:
    """{weight of a layer: (entries, output rows)}."""
    weights = {str(site.weight.target): site.transposed for site in sites(gm)}
    tensors = {name: fetch(gm, name) for name in weights}
    return {
        name: (tensor.numel(), tensor.shape[1 if weights[name] else 0]) for name, tensor in tensors.items()
    }
