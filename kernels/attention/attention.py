"""Attention without a gradient, in fp32 on the CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.kernel import register_glue
from fxsparse.kernels.library import define, refuse_gradient


@register_glue
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``F.scaled_dot_product_attention`` of the same arguments, without dropout; without a gradient.

    Tensors are [batch, heads, tokens, features]; heads and tokens of the result lie in memory as those of the query do,
    as torch has it on the CPU.  Other dtypes than fp32 and other dimensions are left to torch.

    Raises:
        UnsupportedError: an input requires a gradient.
    """
    given = [t for t in (query, key, value, attn_mask) if t is not None]
    refuse_gradient(*given)
    if not _serves(given):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    tokens_first = query.stride(1) < query.stride(2)
    y = torch.ops.fxsparse.attention(query, key, value, attn_mask, is_causal, factor, tokens_first)
    return y.transpose(1, 2) if tokens_first else y


def _serves(given: list[Tensor]) -> bool:
    query, key, value, *masks = given
    return (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.dtype == key.dtype == value.dtype == torch.float32
        and all(mask.dtype in (torch.float32, torch.bool) for mask in masks)
        and not torch.is_autocast_enabled(query.device.type)
    )


def reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, tokens_first: bool
) -> Tensor:
    """The same in plain PyTorch; a query that sees no key gets zeros."""
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        scores = scores.masked_fill(scores.new_ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    unseen = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores, -1).masked_fill(unseen, 0.0)
    y = weights @ v
    return y.transpose(1, 2).contiguous() if tokens_first else y


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, tokens_first: bool
) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, *((tokens, heads) if tokens_first else (heads, tokens)), v.shape[3])


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, bool tokens_first) -> Tensor",
    reference,
    _fake,
)
