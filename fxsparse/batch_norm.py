"""The calls of BatchNorm in a graph, whatever their form."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from fxsparse.graph import argument

_STATISTICS = ("running_mean", "running_var", "weight", "bias")


@dataclass(frozen=True)
class BatchNormCall:
    """One call of BatchNorm."""

    node: Node
    title: str
    names: dict[str, str | None]
    """{"running_mean", "running_var", "weight", "bias": name of the tensor, None where it has none or computes it}."""
    eps: float
    training: bool
    act: str | None = None
    """Path of an activation that the same module applies after the norm (timm's BatchNormAct2d)."""
    refusal: str | None = None
    """Why what it computes is not known."""
    is_module: bool = False


def read_batch_norm(gm: GraphModule, node: Node) -> BatchNormCall | None:
    """The call that a node is, as a module, in functional or in aten form; None for other nodes."""
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


def _read_module(node: Node, path: str, module: Any) -> BatchNormCall:
    names = {name: None if getattr(module, name) is None else f"{path}.{name}" for name in _STATISTICS}
    act, refusal = None, None
    if type(module).forward is not _BatchNorm.forward and type(module) is not nn.SyncBatchNorm:
        if type(module).__name__ == "BatchNormAct2d" and type(getattr(module, "drop", None)) is nn.Identity:
            act = f"{path}.act"
        else:
            refusal = f"{type(module).__name__} overrides forward"
    return BatchNormCall(node, path, names, module.eps, module.training, act, refusal, is_module=True)


def _read_call(gm: GraphModule, node: Node, tensors: list[Any], training: bool, eps: float) -> BatchNormCall:
    given = {name: t for name, t in zip(_STATISTICS, tensors, strict=True) if isinstance(t, Node)}
    read = {name: str(t.target) for name, t in given.items() if t.op == "get_attr"}
    names, known = {name: read.get(name) for name in _STATISTICS}, len(read) == len(given)
    return BatchNormCall(
        node, node.name, names, eps, training, None, None if known else "its statistics are computed"
    )
