"""Cannistraci-Hebb: which links of a network to grow, and which lead nowhere, by its topology; arXiv:2501.19107."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def cht_scores(links: Tensor, kind: str) -> Tensor:
    """For every pair of an output and an input how well paths of length 3 connect them, [out, in] like `links` B.

    With common neighbours ``DD = B B'``, external links ``e[i, j] = max(deg_j - DD[i, j] - 1, 0)`` and
    ``phi = [DD > 0] / (1 + e)`` ("ch3") or ``(1 + DD) [DD > 0] / (1 + e)`` ("ch2"), of both sides:
    ``phi_out B + (phi_in B')'``.
    """
    b = links.float()
    return _phi(b, kind) @ b + (_phi(b.t(), kind) @ b.t()).t()


def _phi(b: Tensor, kind: str) -> Tensor:
    common = b @ b.t()
    external = (b.sum(1) - common - 1).clamp_min(0)
    return torch.where(common > 0, (1 + common if kind == "ch2" else 1) / (1 + external), 0)


def whole_chains(links: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Masks without the links of neurons that have none on their other side, until there is no such neuron.

    `pairs`: (name of a mask [out, in], name of the one whose inputs are its outputs).
    """
    masks, count = {name: mask.clone() for name, mask in links.items()}, -1
    while count != (left := sum(int(mask.sum()) for mask in masks.values())):
        count = left
        for into, out in pairs:
            dead = ~masks[into].any(1) | ~masks[out].any(0)
            masks[into][dead] = False
            masks[out][:, dead] = False
    return masks
