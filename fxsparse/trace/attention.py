"""Traceable forwards of torch's attention modules, whose own forwards hide their weights behind fast paths.

The projections are ``F.linear`` on ``in_proj_weight`` and ``out_proj.weight``, so passes see these weights.
No function
here looks at sizes of its inputs: inputs may be batched or not, and proxies have no sizes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import wrap

from fxsparse.trace.modules import has_hooks


def refuses_attention(module: nn.Module) -> str | None:
    """Why a MultiheadAttention cannot be rewritten; None if it can."""
    if not isinstance(module, nn.MultiheadAttention):
        return f"{type(module).__name__} is not nn.MultiheadAttention"
    if type(module).forward is not nn.MultiheadAttention.forward:
        return f"{type(module).__name__} overrides forward"
    if not module._qkv_same_embed_dim:
        return "kdim or vdim differ from embed_dim"
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv and add_zero_attn lengthen the sequence"
    if has_hooks(module) or has_hooks(module.out_proj):
        return "the module has hooks, which only run when it is called"
    return None


def traceable_forward(module: nn.Module) -> Callable[..., Any] | None:
    """A forward of the same function, taking the module first, for torch's attention modules; None for
    others.
    """
    if refuses_attention(module) is None:
        return attention_forward
    if has_hooks(module):
        return None
    return _FORWARDS.get(type(module))


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward``; `is_causal` is a hint there, so the mask decides here too."""
    heads, axis = module.num_heads, -3 if module.batch_first else 0
    projected = _project(module, query, key, value)
    q, k, v = (_to_heads(projected[j], heads, axis) for j in range(3))  # [..., heads, length, head_dim]
    dropout = module.dropout if module.training else 0.0
    mask = None
    if attn_mask is not None or key_padding_mask is not None:
        mask = attention_mask(attn_mask, key_padding_mask, q)
    if need_weights:
        weights = _attention_weights(q, k, mask)
        dropped = F.dropout(weights, dropout) if dropout > 0.0 else weights
        out = torch.matmul(dropped, v)
        seen = dropped.mean(-3) if average_attn_weights else dropped
    else:
        out, seen = F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    # Sequence first in memory, as in torch: a dropout that follows draws its numbers in memory order.
    merged = F.linear(out.movedim(-2, 0).flatten(-2), module.out_proj.weight, module.out_proj.bias)
    return (merged.movedim(0, -2) if module.batch_first else merged), seen


@wrap
def attention_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor:
    """The two masks as one that is added to scores ``[batch, heads, length, source]``, in the query's dtype.

    `query`: ``[batch, heads, length, head_dim]`` or ``[heads, length, head_dim]``.  True means "do not
    attend".
    """
    merged = None
    if attn_mask is not None:
        merged = _additive(attn_mask, query.dtype)
        if merged.dim() == 3 and query.dim() == 4:
            merged = merged.view(query.shape[0], query.shape[1], *merged.shape[1:])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, query.dtype)
        padding = padding[:, None, None, :] if query.dim() == 4 else padding[None, None, :]
        merged = padding if merged is None else merged + padding
    return merged  # type: ignore[return-value]


def encoder_layer_forward(
    module: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """``nn.TransformerEncoderLayer.forward`` without its fast path."""
    attend = (src_mask, src_key_padding_mask, is_causal)
    if module.norm_first:
        src = src + module._sa_block(module.norm1(src), *attend)
        return src + module._ff_block(module.norm2(src))
    src = module.norm1(src + module._sa_block(src, *attend))
    return module.norm2(src + module._ff_block(src))


def encoder_forward(
    module: Any,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """``nn.TransformerEncoder.forward`` without nested tensors; the causal hint is left to the mask."""
    for layer in module.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return src if module.norm is None else module.norm(src)


def decoder_forward(
    module: Any,
    tgt: Tensor,
    memory: Tensor,
    tgt_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Tensor:
    """``nn.TransformerDecoder.forward``; the causal hints are left to the masks."""
    masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
    for layer in module.layers:
        tgt = layer(tgt, memory, *masks)
    return tgt if module.norm is None else module.norm(tgt)


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoderLayer: encoder_layer_forward,
    nn.TransformerEncoder: encoder_forward,
    nn.TransformerDecoder: decoder_forward,
    nn.TransformerDecoderLayer: nn.TransformerDecoderLayer.forward,
}


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values; read by index, since a proxy cannot be iterated."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if query is key and key is value:
        return F.linear(query, weight, bias).chunk(3, -1)
    weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(x, weights[j], biases[j]) for j, x in enumerate((query, key, value))]


def _to_heads(x: Tensor, heads: int, axis: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).movedim(axis, -2)


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(q * math.sqrt(1.0 / q.size(-1)), k.transpose(-2, -1))
    return F.softmax(scores if mask is None else scores + mask, -1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
