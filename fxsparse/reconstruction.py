"""Removing entries of a matrix so that its products with given inputs change little: SparseGPT, arXiv:2301.00774."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxsparse.errors import NumericsError, PlanError
from fxsparse.pattern import NM, Block, ConstantFanIn, Pattern, Unstructured

_ESCALATION = (0.01, 0.1, 1.0)
"""Dampings that are tried where the wanted one leaves H without a Cholesky factor."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """A pruned matrix and what it costs."""

    matrix: Tensor
    loss: Tensor
    """[rows]: half of ``d H d'`` for the row's change d, with H as it was damped."""
    note: str
    """What a report should say; mostly nothing."""


def reconstruct(
    matrix: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    nnz: int,
    *,
    damping: float = 0.01,
    width: int = 128,
) -> Reconstruction:
    """Prune `matrix` [rows, columns] to ``pattern.feasible(nnz)`` entries, changing what it keeps.

    From left to right, what is removed from a column is made up for in the columns right of it.  An unstructured
    choice is made for `width` columns at a time over all rows, a constant fan-in in each row; N:M chooses in each group
    when it is reached, and blocks in as many whole blocks of columns as `width` holds, at least one.

    Args:
        hessian: [columns, columns], 2 X'X / n for inputs X [n, columns]; not changed.

    Raises:
        NumericsError: `hessian` is not finite, or has no Cholesky factor however it is damped.
        PlanError: a pattern of another kind.
    """
    unit, chosen_at_once, choice = _choice(matrix, pattern, width)
    factor, dead, note = _inverse_factor(hessian, damping)
    factor, scale = factor.to(matrix), factor.diagonal().to(matrix)
    left, columns, units = matrix.clone(), matrix.shape[1], nnz // unit
    kept = torch.zeros_like(left, dtype=torch.bool)
    loss = torch.zeros(len(left), dtype=torch.float64, device=left.device)
    stride = max(width // chosen_at_once, 1) * chosen_at_once
    for first in range(0, columns, stride):
        last = min(first + stride, columns)
        errors = left.new_zeros(len(left), last - first)
        for j in range(first, last):
            if (j - first) % chosen_at_once == 0:
                end = min(j + chosen_at_once, last)
                score = (left[:, j:end] / scale[j:end]).square().masked_fill(dead[j:end], 0)
                count = (units * end // columns - units * j // columns) * unit
                kept[:, j:end] = choice.project(score, count)
            column = left[:, j].clone()
            stays = torch.where(kept[:, j], column, 0)
            error = (column - stays) / scale[j]
            left[:, j:last] -= error[:, None] * factor[j, j:last]
            left[:, j] = stays
            errors[:, j - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
        loss += errors.double().square().sum(1) / 2
    return Reconstruction(left, loss, note)


def _choice(matrix: Tensor, pattern: Pattern, width: int) -> tuple[int, int, Pattern]:
    """(entries that are counted as one, columns that are chosen among at once, the pattern of these columns)."""
    if isinstance(pattern, Unstructured):
        return 1, width, pattern
    if isinstance(pattern, ConstantFanIn):
        return len(matrix), width, ConstantFanIn()
    if isinstance(pattern, NM):
        return 1, pattern.m, pattern
    if isinstance(pattern, Block):
        return pattern.rows * pattern.cols, max(width // pattern.cols, 1) * pattern.cols, pattern
    raise PlanError(
        f"sparsegpt chooses among some columns at a time: expected Unstructured, ConstantFanIn, NM or Block, "
        f"got {pattern!r}. Use wanda(), which takes any."
    )


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, str]:
    """(upper U with ``U' U = H^-1``, float64; bool [columns] of those that saw only zeros; note).

    Those columns get the mean of the others' diagonal, so that they change nothing else.
    """
    wide = hessian.double()
    diagonal = wide.diagonal()
    if not bool(wide.isfinite().all()):
        raise NumericsError(
            "expected finite inputs on the calibration batches, got inf or NaN; look for the batch or the layer before "
            "that makes them."
        )
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    for amount in (damping, *(more for more in _ESCALATION if more > damping)):
        damped = wide + torch.diag(torch.where(dead, mean, 0.0) + amount * mean)
        # H = R R' with R upper, from the factor of H read backwards; then H^-1 = U' U with U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(failed) == 0:
            eye = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            note = "" if amount == damping else f"damping raised from {damping:g} to {amount:g}"
            return factor, dead, note
    raise NumericsError(
        f"H has no Cholesky factor, even with {_ESCALATION[-1]:g} of its mean diagonal added to it; expected one from "
        f"damping={damping:g} on. Give more calibration batches, or a larger damping."
    )
