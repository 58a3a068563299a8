"""Fold BatchNorm in evaluation into the convolution or linear layer before it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxsparse.graph import Site, argument, attribute_nodes, fetch, insert_get_attr, owner, sites
from fxsparse.packed import drop_tensor, replace_parameter
from fxsparse.pipeline import PassContext

_FOLDABLE = ("linear", "conv1d", "conv2d", "conv3d")
_STATISTICS = ("running_mean", "running_var", "weight", "bias")


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
            norm = _read_norm(gm, node)
            if norm is None:
                continue
            by_node = {site.node: site for site in sites(gm)}
            site = by_node.get(node.args[0]) if node.args else None
            reason = _refusal(gm, norm, site)
            if reason is None:
                reason = _fold(gm, ctx, norm, site)  # type: ignore[arg-type]
            if reason is None:
                folded += 1
            else:
                ctx.notes.append(f"{norm.title} stays: {reason}")
        return folded


@dataclass(frozen=True)
class _Norm:
    """One call of BatchNorm: the names of its tensors, None where it has none."""

    node: Node
    title: str
    names: dict[str, str | None]
    eps: float
    training: bool
    act: str | None = None
    """Path of an activation that the same module applies after the norm (timm's BatchNormAct2d)."""
    refusal: str | None = None
    is_module: bool = False


def _read_norm(gm: GraphModule, node: Node) -> _Norm | None:
    if node.op == "call_module":
        path = str(node.target)
        module = gm.get_submodule(path)
        return _read_module(node, path, module) if isinstance(module, _BatchNorm) else None
    if node.target is F.batch_norm:
        tensors = [argument(node, k + 1, name) for k, name in enumerate(_STATISTICS)]
        training, eps = argument(node, 5, "training"), argument(node, 7, "eps")
        return _read_call(gm, node, tensors, bool(training), 1e-5 if eps is None else eps)
    if node.target is torch.ops.aten.batch_norm.default:
        weight, bias, mean, var, training, _, eps = node.args[1:8]
        return _read_call(gm, node, [mean, var, weight, bias], bool(training), float(eps))  # type: ignore[arg-type]
    return None


def _read_module(node: Node, path: str, module: Any) -> _Norm:
    names = {name: None if getattr(module, name) is None else f"{path}.{name}" for name in _STATISTICS}
    act, refusal = None, None
    if type(module).forward is not _BatchNorm.forward and type(module) is not nn.SyncBatchNorm:
        if type(module).__name__ == "BatchNormAct2d" and type(getattr(module, "drop", None)) is nn.Identity:
            act = f"{path}.act"
        else:
            refusal = f"{type(module).__name__} overrides forward"
    return _Norm(node, path, names, module.eps, module.training, act, refusal, is_module=True)


def _read_call(gm: GraphModule, node: Node, tensors: list[Any], training: bool, eps: float) -> _Norm:
    known = all(t is None or (isinstance(t, Node) and t.op == "get_attr") for t in tensors)
    names = {
        name: str(t.target) if isinstance(t, Node) else None
        for name, t in zip(_STATISTICS, tensors, strict=True)
    }
    return _Norm(
        node, node.name, names, eps, training, None, None if known else "its statistics are computed"
    )


def _refusal(gm: GraphModule, norm: _Norm, site: Site | None) -> str | None:
    if norm.refusal is not None:
        return norm.refusal
    if norm.training or norm.names["running_mean"] is None:
        return "it normalises by the batch, not by running statistics"
    if site is None or site.op not in _FOLDABLE:
        return "no convolution or linear layer with a weight of its own comes right before it"
    if len(site.node.users) > 1:
        return f"the output of {site.node.name} has {len(site.node.users)} readers"
    readers = _readers(gm, str(site.weight.target))
    if readers > 1:
        return f"{site.weight.target} has {readers} call sites"
    if site.transposed or site.sliced:
        return f"{site.weight.target} is read transposed or in part"
    value = site.node.meta.get("val")
    if site.op == "linear" and (value is None or value.dim() != 2):
        return "a linear layer's channels are dimension 1 only for 2-D outputs"
    bias = argument(site.node, 2, "bias")
    if bias is not None and (not isinstance(bias, Node) or bias.op != "get_attr"):
        return f"the bias of {site.node.name} is computed"
    return None


def _fold(gm: GraphModule, ctx: PassContext, norm: _Norm, site: Site) -> str | None:
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
    _set_bias(gm, site, bias)
    _erase(gm, norm, site)
    _forget(gm, ctx, norm, name)
    return None


def _set_bias(gm: GraphModule, site: Site, bias: Tensor) -> None:
    node, old = site.node, argument(site.node, 2, "bias")
    if old is not None and _readers(gm, str(old.target)) == 1:
        replace_parameter(gm, str(old.target), bias)
        return
    path, _, leaf = str(site.weight.target).rpartition(".")
    module, _ = owner(gm, str(site.weight.target))
    free = leaf == "weight" and module._parameters.get("bias", 0) is None
    name = f"{path}." * bool(path) + ("bias" if free else f"{leaf}_folded_bias")
    replace_parameter(gm, name, bias)
    new = insert_get_attr(gm.graph, name, node)
    new.meta["val"] = fetch(gm, name)
    kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
    node.args, node.kwargs = (*node.args[:2], new, *node.args[3:]), kwargs


def _erase(gm: GraphModule, norm: _Norm, site: Site) -> None:
    result = site.node
    if norm.act is not None:
        with gm.graph.inserting_after(site.node):
            result = gm.graph.call_module(norm.act, (site.node,))
    norm.node.replace_all_uses_with(result)
    gm.graph.erase_node(norm.node)


def _forget(gm: GraphModule, ctx: PassContext, norm: _Norm, into: str) -> None:
    """Drop the tensors of a norm that nothing reads any more, so that the artefact does not carry them."""
    if norm.is_module and gm.graph.find_nodes(op="call_module", target=norm.title):
        return
    names = [*norm.names.values(), f"{norm.title}.num_batches_tracked" if norm.is_module else None]
    for name in filter(None, names):
        if _readers(gm, name) == 0:
            for node in attribute_nodes(gm.graph, name):
                gm.graph.erase_node(node)
            drop_tensor(gm, name)
            if name in ctx.untouched:
                ctx.untouched[name] = f"folded into {into}"


def _readers(gm: GraphModule, name: str) -> int:
    """Nodes that read the tensor at `name`."""
    return sum(len(node.users) for node in attribute_nodes(gm.graph, name))
