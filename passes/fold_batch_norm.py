"""Fold BatchNorm in evaluation into the convolution or linear layer before it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from fxsparse.batch_norm import BatchNormCall, read_batch_norm
from fxsparse.graph import Site, argument, attribute_nodes, fetch, readers, sites
from fxsparse.packed import drop_tensor, replace_parameter, set_bias
from fxsparse.pipeline import PassContext

_FOLDABLE = ("linear", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class FoldBatchNorm:
    """conv -> BatchNorm becomes one conv with ``w * s`` and ``(b - mean) * s + beta``, s = gamma / sqrt(var + eps).

    Zeros stay zeros.  s is taken in fp64 and the new weight rounded once, so an output differs from the unfolded one by
    a few roundings of its dtype.  Only where the convolution's output has no other reader and its weight no other call
    site; every BatchNorm that stays is noted with its reason.
    """

    name: ClassVar[str] = "fold-batch-norm"
    after: ClassVar[tuple[str, ...]] = ("collect-weights", "infer-shapes", "remove-identities")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of folded BatchNorms."""
        folded = 0
        for node in list(gm.graph.nodes):
            norm = read_batch_norm(gm, node)
            if norm is None:
                continue
            by_node = {site.node: site for site in sites(gm)}
            site = by_node.get(argument(node, 0, "input"))
            reason = _refusal(gm, norm, site)
            if reason is None:
                reason = _fold(gm, ctx, norm, site)  # type: ignore[arg-type]
            if reason is None:
                folded += 1
            else:
                ctx.notes.append(f"{norm.title} stays: {reason}")
        return folded


def _refusal(gm: GraphModule, norm: BatchNormCall, site: Site | None) -> str | None:
    if norm.refusal is not None:
        return norm.refusal
    if norm.training or norm.names["running_mean"] is None:
        return "it normalises by the batch, not by running statistics"
    if site is None or site.op not in _FOLDABLE:
        return "no convolution or linear layer with a weight of its own comes right before it"
    if len(site.node.users) > 1:
        return f"the output of {site.node.name} has {len(site.node.users)} readers"
    if fetch(gm, str(site.weight.target)).is_meta:
        return f"{site.weight.target} is stored as its nonzeros, as a dense one would not fit"
    calls = readers(gm.graph, str(site.weight.target))
    if calls > 1:
        return f"{site.weight.target} has {calls} call sites"
    if site.transposed or site.sliced:
        return f"{site.weight.target} is read transposed or in part"
    value = site.node.meta.get("val")
    if site.op == "linear" and (value is None or value.dim() != 2):
        return "a linear layer's channels are dimension 1 only for 2-D outputs"
    bias = argument(site.node, 2, "bias")
    if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
        return f"the bias of {site.node.name} is computed"
    return None


def _fold(gm: GraphModule, ctx: PassContext, norm: BatchNormCall, site: Site) -> str | None:
    """Write the folded tensors and edit the graph; a reason instead where the numbers do not allow it."""
    name, bias_node = str(site.weight.target), argument(site.node, 2, "bias")
    weight = fetch(gm, name)
    tensors = {key: None if n is None else fetch(gm, n).detach().double() for key, n in norm.names.items()}
    scale = torch.rsqrt(tensors["running_var"] + norm.eps)  # type: ignore[operator]
    scale = scale if tensors["weight"] is None else scale * tensors["weight"]
    old_bias = (
        torch.zeros_like(scale) if bias_node is None else fetch(gm, str(bias_node.target)).detach().double()
    )
    bias = (old_bias - tensors["running_mean"]) * scale  # type: ignore[operator]
    bias = bias if tensors["bias"] is None else bias + tensors["bias"]
    new_weight = (weight.detach().double() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    bias = bias.to(weight.dtype)
    if not bool(new_weight.isfinite().all() and bias.isfinite().all()):
        return f"the folded weight does not fit {weight.dtype}"
    replace_parameter(gm, name, new_weight)
    set_bias(gm, site, bias)
    _erase(gm, norm, site)
    _forget(gm, ctx, norm, name)
    return None


def _erase(gm: GraphModule, norm: BatchNormCall, site: Site) -> None:
    result = site.node
    if norm.act is not None:
        with gm.graph.inserting_after(site.node):
            result = gm.graph.call_module(norm.act, (site.node,))
        result.meta = dict(norm.node.meta)
    norm.node.replace_all_uses_with(result)
    gm.graph.erase_node(norm.node)


def _forget(gm: GraphModule, ctx: PassContext, norm: BatchNormCall, into: str) -> None:
    """Drop the tensors of a norm that nothing reads any more, so that the artefact does not carry them."""
    if norm.is_module and gm.graph.find_nodes(op="call_module", target=norm.title):
        return
    names = [*norm.names.values(), f"{norm.title}.num_batches_tracked" if norm.is_module else None]
    for name in filter(None, names):
        if readers(gm.graph, name) == 0:
            for node in attribute_nodes(gm.graph, name):
                gm.graph.erase_node(node)
            drop_tensor(gm, name)
            if name in ctx.untouched:
                ctx.untouched[name] = f"folded into {into}"
