"""Transformers: the SimpleViT of GSE's CIFAR tables, and a language model over bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over [batch, tokens, width]; `causal` hides later tokens."""

    def __init__(self, width: int, heads: int, head_width: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and two linear layers, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, causal: bool = False) -> None:
        super().__init__()
        self.attention = Attention(width, heads, head_width, causal)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class SimpleViT(nn.Module):
    """SimpleViT (arXiv:2205.01580) for 32x32 images as GSE (arXiv:2401.06898) has it: patches of 4, depth 4.

    512 wide, 6 heads of 64, 256 between the linear layers; `width` multiplies all three (there are more heads then,
    not wider ones).  Positions are sines and cosines without parameters, and tokens are averaged.
    """

    def __init__(self, classes: int = 10, width: int = 1) -> None:
        super().__init__()
        dim, heads, hidden = 512 * width, 6 * width, 256 * width
        self.embed = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, dim), nn.LayerNorm(dim))
        self.register_buffer("positions", sines(8, dim), persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, 64, hidden) for _ in range(4)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, kernel_size=4, stride=4).transpose(1, 2)  # [batch, 64, 48]
        x = self.blocks(self.embed(patches) + self.get_buffer("positions"))
        return self.head(self.norm(x).mean(1))


def sines(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column at falling frequencies: [side * side, width]."""
    frequencies = 10_000.0 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    rows, columns = angles.repeat_interleave(side, 0), angles.repeat(side, 1)
    return torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), 1)


class ByteTransformer(nn.Module):
    """A causal language model over bytes: int64 [batch, tokens] in, logits [batch, tokens, 256] out.

    0.3 M parameters: two blocks of width 96 with four heads, for up to 128 tokens.
    """

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 4, tokens: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(0.1 * torch.randn(256, width), freeze=False)
        self.position = nn.Parameter(0.1 * torch.randn(tokens, width))
        blocks = (Block(width, heads, width // heads, 4 * width, causal=True) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position[: x.shape[1]])))
