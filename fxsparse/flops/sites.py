"""The call sites of a graph whose nodes carry their values' shapes."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from sympy import Symbol
from torch import nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from fxsparse.flops.reading import Reading
from fxsparse.flops.site import CallSite
from fxsparse.graph import ATEN_SITES, SITE_OPS, fetch

_aten = torch.ops.aten

MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.modules.batchnorm._BatchNorm: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.MaxPool1d: "max_pool",
    nn.MaxPool2d: "max_pool",
    nn.MaxPool3d: "max_pool",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool",
}
FUNCTIONS: dict[Any, str] = {
    **SITE_OPS,
    **{aten: SITE_OPS[call] for aten, call in ATEN_SITES.items()},
    **dict.fromkeys([F.batch_norm, torch.batch_norm, _aten.batch_norm.default], "batch_norm"),
    **dict.fromkeys([F.layer_norm, torch.layer_norm, _aten.layer_norm.default], "layer_norm"),
    **dict.fromkeys([F.max_pool1d, F.max_pool2d, F.max_pool3d, _aten.max_pool2d.default], "max_pool"),
    **dict.fromkeys(
        [
            F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d,
            F.adaptive_avg_pool3d,
            _aten.adaptive_avg_pool2d.default,
        ],
        "adaptive_avg_pool",
    ),
    **dict.fromkeys(
        [F.scaled_dot_product_attention, _aten.scaled_dot_product_attention.default], "attention"
    ),
    **dict.fromkeys(
        [
            torch.matmul,
            torch.mm,
            torch.bmm,
            torch.mv,
            torch.dot,
            torch.inner,
            torch.linalg.matmul,
            operator.matmul,
            _aten.matmul.default,
            _aten.mm.default,
            _aten.bmm.default,
        ],
        "matmul",
    ),
    **dict.fromkeys([torch.addmm, torch.baddbmm, _aten.addmm.default, _aten.baddbmm.default], "addmm"),
    **dict.fromkeys([torch.einsum, _aten.einsum.default], "einsum"),
}
METHODS = {
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "inner"), "matmul"),
    **dict.fromkeys(("addmm", "baddbmm"), "addmm"),
}
WITHOUT_FORMULA = {
    torch.tensordot,
    torch.addbmm,
    torch.chain_matmul,
    torch.linalg.multi_dot,
    torch.sparse.mm,
    torch.sparse.addmm,
    torch.sparse.sampled_addmm,
    F.bilinear,
}
OUT_OF_SIGHT = "what is no plain layer, and a layer's calls but the last: the module walk does not see them"
WITHOUT_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.modules.batchnorm._NormBase, nn.LayerNorm)


@dataclass(frozen=True)
class Sites:
    """What counting reads of a graph."""

    found: tuple[CallSite, ...]
    """In graph order."""
    uncounted: tuple[str, ...] = ()
    """Calls without shapes or formula, calls inside of regions such as the branches of a cond, modules that hold
    matrices and are called as a whole, such as an LSTM, and what a walk over modules cannot see."""
    sizes: Mapping[Symbol, int] = field(default_factory=dict)
    """Size in the example inputs of every symbol but `BATCH`, and of that too where `samples` is above 1."""
    samples: int = 1
    """Samples that the sizes stand for: the example's batch where it is no symbol or sizes depend on values, else 1."""


def call_sites(gm: GraphModule) -> Sites:
    """The calls of a graph whose nodes hold fake or real values in ``node.meta["val"]``.

    The symbols that `InferShapes` left in ``gm.meta["symbols"]`` become `BATCH` and `SEQUENCE`.  Without them a
    symbolic dimension 0 of an input becomes `BATCH`, a symbolic dimension 1 of an input [batch, sequence]
    of integers or [batch, sequence, features] `SEQUENCE`.
    """
    reading = Reading.of(gm)
    found: list[CallSite] = []
    uncounted: list[str] = []
    if any("module" in node.meta for node in gm.graph.find_nodes(op="placeholder")):
        uncounted.append(OUT_OF_SIGHT)
    for node in gm.graph.nodes:
        op = _op(gm, node)
        if op is not None and not reading.has_values(node):
            uncounted.append(f"{node.name}: its shapes are unknown")
        elif op is not None:
            found.append(reading.site(node, op))
        elif node.op == "call_module" and _holds_matrix(gm.get_submodule(str(node.target))):
            kind = type(gm.get_submodule(str(node.target))).__name__
            uncounted.append(f"{node.target}: a {kind} is called as a whole")
        elif node.target in WITHOUT_FORMULA:
            uncounted.append(f"{node.name}: a product without a formula here")
        elif any(_has_sites(region) for region in _regions(gm, node)):
            uncounted.append(f"{node.name}: layers and products inside of its {node.target}")
    return Sites(tuple(found), tuple(uncounted), reading.sizes, reading.samples)


def _op(gm: GraphModule, node: Node) -> str | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return next((op for kind, op in MODULES.items() if isinstance(module, kind)), None)
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    return FUNCTIONS.get(node.target) if node.op == "call_function" else None


def _regions(gm: GraphModule, node: Node) -> list[GraphModule]:
    """The graphs that an op takes, such as the branches of a cond."""
    if not isinstance(node.target, HigherOrderOperator):
        return []
    given = [fetch(gm, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return [value for value in given if isinstance(value, GraphModule)]


def _has_sites(gm: GraphModule) -> bool:
    return any(_op(gm, node) or any(map(_has_sites, _regions(gm, node))) for node in gm.graph.nodes)


def _holds_matrix(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters()) and not isinstance(module, WITHOUT_PRODUCTS)
