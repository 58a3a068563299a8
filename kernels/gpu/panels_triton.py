"""A batch with its tokens side by side, so that a kernel gathers one feature of many tokens at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEATURES = 128
"""Of the tile that a program turns."""


@triton.jit
def turn(x, panels, tokens, features, stride, TOKENS: tl.constexpr, FEATURES: tl.constexpr):
    """Panels [tiles, features, TOKENS] of x [tokens, features]; program (tile of features, tile of tokens)."""
    blocks = tl.cdiv(features, FEATURES)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    feature = (tl.program_id(0) % blocks) * FEATURES + tl.arange(0, FEATURES)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    known = (feature < features)[:, None]
    read = x + token[None, :] * stride + feature[:, None]
    written = panels + (tile * features + feature[:, None]) * TOKENS + tl.arange(0, TOKENS)[None, :]
    tl.store(written, tl.load(read, mask=known & (token < tokens)[None, :], other=0.0), mask=known)


def panels_of(x: Tensor, width: int) -> Tensor:
    """[tiles, features, width] of `x` [tokens, features]: tile by tile its transpose, zeros after the last token."""
    tokens, features = x.shape
    if width == 1 and x.is_contiguous():
        return x.unsqueeze(-1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    panels = x.new_empty(triton.cdiv(tokens, width), features, width)
    if panels.numel():
        grid = (len(panels) * triton.cdiv(features, _FEATURES),)
        turn[grid](x, panels, tokens, features, x.stride(0), width, _FEATURES)
    return panels


def variants(dtypes: tuple[torch.dtype, ...], widths: tuple[int, ...]):
    """Of `turn`, as ``_triton.variants`` of the kernels that use it."""
    for dtype in dtypes:
        for width in widths:
            given = [dtype, dtype, 256, 4096, 4096, width, _FEATURES]
            yield f"turn {dtype}, {width} tokens", turn, dict(zip(turn.arg_names, given, strict=True)), {}
