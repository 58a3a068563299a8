"""Wanda: one-shot pruning by weight times the norm of what it is multiplied with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxsparse.method import Method, register
from fxsparse.pattern import Pattern, Unstructured
from fxsparse.reparam import HardMask
from fxsparse.scores import magnitude
from fxsparse.topk import top_mask


@dataclass(frozen=True)
class ByInputNorm:
    """Keeps the largest ``|W_ij| * ||x_j||``, compared inside an output row; what is kept is not changed."""

    products: ClassVar[bool] = False

    def __call__(self, matrix: Tensor, moments: Tensor, pattern: Pattern, nnz: int) -> tuple[Tensor, str]:
        score = matrix.abs() * moments.sqrt().to(matrix)
        chosen = row_by_row(score, nnz) if isinstance(pattern, Unstructured) else pattern.project(score, nnz)
        return torch.where(chosen, matrix, 0), ""


def row_by_row(score: Tensor, nnz: int) -> Tensor:
    """Bool mask of the `nnz` largest of `score` [rows, columns], as many in each row.

    Where `nnz` is no multiple of the rows, those whose next score is largest keep one more.
    """
    each, more = divmod(nnz, len(score))
    chosen = top_mask(score, each, dim=1)
    if not more:
        return chosen
    left = score.masked_fill(chosen, -torch.inf)
    rows = top_mask(left.amax(1), more)
    return chosen | (top_mask(left, 1, dim=1) & rows[:, None])


@register
def wanda() -> Method:
    """Keep the weights whose magnitude times the norm of their input is largest: Sun et al. 2023, arXiv:2306.11695.

    A method of ``fxsparse.prune(model, plan, calibration=batches)``; it does not train.  Unstructured masks keep as
    many entries in every output row; where the plan's count is no multiple of the rows, some rows keep one more (the
    paper's code drops ``int(columns * sparsity)`` in every row).  N:M compares inside a group, ``Block`` over the whole
    weight.  A plan's default allocation is the paper's, "uniform".
    """
    return Method(
        "wanda",
        HardMask(),
        magnitude,
        source="arXiv:2306.11695",
        allocation="uniform",
        one_shot=ByInputNorm(),
    )
