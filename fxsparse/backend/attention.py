"""Calls of PyTorch's attention as one op, taken apart, so that the weights in them have call sites."""

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from fxsparse.trace.attention import attention_forward


def open_attention(gm: GraphModule) -> int:
    """Write such calls as linear layers around scaled dot products, in place; returns how many.

    Those with masks, biases of key and value, dropout that is on, or whose attention weights are read stay as they are.
    """
    opened = [node for node in list(gm.graph.nodes) if node.target in _OPENED and _open(gm.graph, node)]
    if opened:
        gm.recompile()
    return len(opened)


def _open(graph: Graph, node: Node) -> bool:
    call = _OPENED[node.target]
    parts = [user for user in node.users if user.target is operator.getitem]
    if call is not _encoder_layer and (
        len(parts) < len(node.users) or any(p.args[1] and p.users for p in parts)
    ):
        return False
    tracer = GraphAppendingTracer(graph)
    proxies: dict[Node, Proxy] = {}

    def proxy(source: Node) -> Any:
        return proxies.setdefault(source, Proxy(source, tracer))

    with graph.inserting_before(node):
        result: Any = call(*map_arg(node.args, proxy), **map_arg(node.kwargs, proxy))
    if result is None:
        return False
    for reader in [node] if call is _encoder_layer else parts:
        reader.replace_all_uses_with(result.node)
        graph.erase_node(reader)
    if call is not _encoder_layer:
        graph.erase_node(node)
    return True


def _functional(
    query: Any, key: Any, value: Any, embed_dim: int, num_heads: int, in_weight: Any, in_bias: Any, bias_k: Any,
    bias_v: Any, add_zero_attn: bool, dropout_p: float, out_weight: Any, out_bias: Any, training: bool = True,
    key_padding_mask: Any = None, need_weights: bool = True, attn_mask: Any = None, use_separate: bool = False,
    q_weight: Any = None, k_weight: Any = None, v_weight: Any = None, static_k: Any = None, static_v: Any = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    """``F.multi_head_attention_forward``: sequence first."""
    masks = (bias_k, bias_v, key_padding_mask, attn_mask, static_k, static_v)
    if any(mask is not None for mask in masks) or add_zero_attn or use_separate or (training and dropout_p):
        return None
    module = _module(num_heads, in_weight, in_bias, out_weight, out_bias, batch_first=False)
    return attention_forward(module, query, key, value, need_weights=False)[0]


def _native(
    query: Any, key: Any, value: Any, embed_dim: int, num_head: int, qkv_weight: Any, qkv_bias: Any,
    proj_weight: Any, proj_bias: Any, mask: Any = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: Any = None,
) -> Any:  # fmt: skip
    """``torch._native_multi_head_attention``: batch first."""
    if mask is not None:
        return None
    module = _module(num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, batch_first=True)
    return attention_forward(module, query, key, value, need_weights=False)[0]


def _encoder_layer(
    src: Any, embed_dim: int, num_heads: int, qkv_weight: Any, qkv_bias: Any, proj_weight: Any, proj_bias: Any,
    use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Any, norm_bias_1: Any, norm_weight_2: Any,
    norm_bias_2: Any, ffn_weight_1: Any, ffn_bias_1: Any, ffn_weight_2: Any, ffn_bias_2: Any, mask: Any = None,
    mask_type: Any = None,
) -> Any:  # fmt: skip
    """``torch._transformer_encoder_layer_fwd``: the fast path of nn.TransformerEncoderLayer."""
    if mask is not None:
        return None
    module = _module(num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, batch_first=True)
    activation: Callable[[Tensor], Tensor] = F.gelu if use_gelu else F.relu

    def first_norm(x: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second_norm(x: Any) -> Any:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Any) -> Any:
        return attention_forward(module, x, x, x, need_weights=False)[0]

    def feed_forward(x: Any) -> Any:
        return F.linear(activation(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attend(first_norm(src))
        return src + feed_forward(second_norm(src))
    src = first_norm(src + attend(src))
    return second_norm(src + feed_forward(src))


def _module(heads: int, weight: Any, bias: Any, out_weight: Any, out_bias: Any, *, batch_first: bool) -> Any:
    """What `attention_forward` reads of a module in evaluation mode."""
    out_proj = SimpleNamespace(weight=out_weight, bias=out_bias)
    return SimpleNamespace(
        num_heads=heads, batch_first=batch_first, dropout=0.0, training=False,
        in_proj_weight=weight, in_proj_bias=bias, out_proj=out_proj,
    )  # fmt: skip


_OPENED: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _functional,
    torch._native_multi_head_attention: _native,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
