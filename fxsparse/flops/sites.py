"""The call sites of a graph whose nodes carry their values' shapes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sympy import Symbol
from torch import nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from fxsparse.flops.reading import Reading
from fxsparse.flops.site import CallSite
from fxsparse.graph import SITE_OPS, fetch
from fxsparse.operations import operation

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
OPERATIONS: dict[str, str] = {
    **{op: op for op in SITE_OPS.values()},
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), "batch_norm"),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), "layer_norm"),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"), "max_pool"),
    **dict.fromkeys((f"adaptive_avg_pool{dims}d" for dims in (1, 2, 3)), "adaptive_avg_pool"),
    **dict.fromkeys((f"_adaptive_avg_pool{dims}d" for dims in (2, 3)), "adaptive_avg_pool"),
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner"), "matmul"),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), "addmm"),
    "einsum": "einsum",
    "scaled_dot_product_attention": "attention",
}
WITHOUT_FORMULA = {
    "tensordot", "addbmm", "chain_matmul", "matrix_power", "bilinear", "_trilinear", "conv_tbc", "convolution",
    "_convolution", "cdist", "cov", "corrcoef",
    "_sparse_mm", "_sparse_addmm", "sparse_sampled_addmm", "sspaddmm", "smm", "hspmm", "spmm", "dsmm", "hsmm", "saddmm",
    "_int_mm", "_addmm_activation", "grouped_mm", "_grouped_mm", "scaled_mm", "_scaled_mm", "scaled_grouped_mm",
    "_scaled_grouped_mm", "linear_cross_entropy", "_weight_int8pack_mm", "_weight_int4pack_mm",
    "_weight_int4pack_mm_for_cpu",
    "gru", "lstm", "rnn_tanh", "rnn_relu", "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "multi_head_attention_forward", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "flex_attention",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", "_flash_attention_forward",
    "_efficient_attention_forward",
    "matrix_exp", "orgqr", "ormqr", "geqrf", "svd", "svd_lowrank", "pca_lowrank", "lobpcg", "cholesky_inverse",
    "cholesky_solve", "inverse", "pinverse", "triangular_solve", "lu", "lu_solve", "det", "logdet", "slogdet",
    "nuclear_norm",
}  # fmt: skip
"""Names of the other ops that multiply matrices, or solve with or factorize one."""
CHEAP_LINALG = ("norm", "vector_norm", "matrix_norm", "cross", "diagonal", "vander")
"""Functions of ``torch.linalg`` that do neither, all others do one."""
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
        if op is not None and reading.has_values(node):
            found.append(reading.site(node, op))
        elif op is not None:
            uncounted.append(f"{node.name}: its shapes are unknown")
        elif (why := _without_formula(gm, node)) is not None:
            uncounted.append(f"{node.target if node.op == 'call_module' else node.name}: {why}")
    return Sites(tuple(found), tuple(uncounted), reading.sizes, reading.samples)


def _op(gm: GraphModule, node: Node) -> str | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return next((op for kind, op in MODULES.items() if isinstance(module, kind)), None)
    return OPERATIONS.get(operation(node) or "")


def _without_formula(gm: GraphModule, node: Node) -> str | None:
    """What a node that is not counted multiplies, in words; None where that is nothing."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return f"a {type(module).__name__} is called as a whole" if _holds_matrix(module) else None
    name = operation(node) or ""
    of_linalg = name.removeprefix("_").startswith("linalg_")
    if name in WITHOUT_FORMULA or (of_linalg and not name.endswith(CHEAP_LINALG)):
        return "it computes with matrices, and has no formula here"
    if any(_multiplies(region) for region in _regions(gm, node)):
        return f"layers and products inside of its {node.target}"
    return None


def _regions(gm: GraphModule, node: Node) -> list[GraphModule]:
    """The graphs that an op takes, such as the branches of a cond."""
    if not isinstance(node.target, HigherOrderOperator):
        return []
    given = [fetch(gm, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
    return [value for value in given if isinstance(value, GraphModule)]


def _multiplies(gm: GraphModule) -> bool:
    return any(_op(gm, node) or _without_formula(gm, node) for node in gm.graph.nodes)


def _holds_matrix(module: nn.Module) -> bool:
    return any(p.dim() > 1 for p in module.parameters()) and not isinstance(module, WITHOUT_PRODUCTS)
