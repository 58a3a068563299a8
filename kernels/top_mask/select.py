"""The op behind ``fxsparse.topk`` on devices: it reads nothing on the host, so that a CUDA graph can hold it."""

import torch
from torch import Tensor

from fxsparse.kernels.library import define, on_gpu


def top_of_rows(scores: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(bool mask of the `n` largest of every row, whether any score is NaN) for scores [rows, columns].

    `n` is one int64, 0 or more, on the scores' device; the lower column wins ties, and -inf is never chosen.  The
    second is int32 [1], above 0 where a score is NaN; the mask then means nothing.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    mask = torch.empty_like(order).scatter_(1, order, ranks) < n
    return mask & (scores > -torch.inf), scores.isnan().any().int().reshape(1)


def _fake(scores: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape, dtype=torch.bool), scores.new_empty(1, dtype=torch.int32)


def _on_gpu(scores: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    from fxsparse.kernels.top_mask import _triton

    return _triton.top_of_rows(scores, n)


define("top_of_rows(Tensor scores, Tensor n) -> (Tensor, Tensor)", top_of_rows, _fake)
on_gpu("top_of_rows", _on_gpu)
