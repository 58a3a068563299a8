"""Exact selection of the n largest scores, in linear time and with one tie order: the lower flat index wins.

``torch.topk`` leaves the order of ties open, and gradients that are exactly 0 (dead ReLUs) tie in masses; a
mask that depended on it would differ between ranks, devices and storages.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.errors import NumericsError

SMALL_GROUP = 8
"""Up to this size, ranking by pairwise comparison beats a partition (2.4 M scores on one core, groups of 4:
12 ms against 28 ms; of 8: 17 against 15; of 16: 27 against 8)."""


def top_mask(scores: Tensor, n: int, dim: int | None = None) -> Tensor:
    """Bool mask of the `n` largest of all scores, or of every slice along `dim`.

    Entries with score -inf are never chosen, so fewer than `n` come back where too few others exist.
    Raises NumericsError on NaN: apart from that one question, which waits for a device, nothing is read on the host
    of what is not on the CPU (``torch.ops.fxsparse.top_of_rows`` leaves the answer on the device).
    """
    scores = scores.detach()
    if dim is None:
        return _top_of_rows(scores.reshape(1, -1), n).view(scores.shape)
    if scores.shape[dim] <= SMALL_GROUP:
        refuse_nan(scores)
        return _top_by_rank(scores.movedim(dim, 0), n).movedim(0, dim)
    last = scores.movedim(dim, -1)
    return _top_of_rows(last.reshape(-1, last.shape[-1]), n).view(last.shape).movedim(-1, dim)


def top_of_all(scores: Sequence[Tensor], n: int) -> list[Tensor]:
    """Bool masks, one of each tensor's shape, of the `n` largest scores of all of them; ties go to the first."""
    mask = top_mask(torch.cat([score.flatten() for score in scores]), n)
    parts = mask.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def top_positions(scores: Tensor, n: int) -> Tensor:
    """Flat positions of ``top_mask(scores, n)``: int64, ascending."""
    return top_mask(scores, n).flatten().nonzero().squeeze(1)


def top_of_tiles(tiles: Iterable[tuple[int, Tensor]], n: int) -> Tensor:
    """Flat positions of the `n` largest scores over tiles (first flat position, scores) in ascending order.

    Equals ``top_positions`` of the joined tiles, ties included, and holds one tile and `n` scores at a time.
    """
    best = positions = None
    for first, tile in tiles:
        scores = tile.detach().flatten()
        if best is None or positions is None:
            best, positions = scores[:0], torch.empty(0, dtype=torch.int64, device=scores.device)
        # A later entry loses every tie, so only a score above the lowest held one can still come in.
        floor = best.min() if 0 < n == len(best) else -torch.inf
        refuse_nan(scores)
        fresh = (scores > floor).nonzero().squeeze(1)
        if len(fresh) > n:
            fresh = fresh[top_positions(scores[fresh], n)]
        best, positions = torch.cat([best, scores[fresh]]), torch.cat([positions, fresh + first])
        if len(best) > n:
            chosen = top_positions(best, n)
            best, positions = best[chosen], positions[chosen]
    return torch.empty(0, dtype=torch.int64) if positions is None else positions


def soft_topk(
    values: Tensor, k: float | Tensor, costs: Tensor | float | None = None, beta: float | Tensor = 20.0
) -> Tensor:
    """Spartan's mask: between 0 and 1, of `values`' shape in at least fp32, with ``(costs * mask).sum() == k``.

    It is ``sigmoid(beta * values / costs + shift)``, the entropic relaxation of the knapsack that keeps the largest
    ``values / costs`` (Tai et al. 2022, arXiv:2205.14107, algorithm 4): as beta grows it becomes `top_mask`.
    Differentiable in `values` (algorithm 5); the cost of the mask stays k under every change of them.

    Args:
        k: budget in units of cost; 0 gives zeros, and all that there is, or more, ones.
        costs: above 0, broadcast to the values; 1 by default.

    Raises:
        NumericsError: values that are not finite, costs that are not above 0 or of another shape, a budget below 0 or
            a beta that is negative or not finite.
    """
    _check_topk(values, k, costs, beta)
    with torch.autocast(values.device.type, enabled=False):
        precise = values if values.dtype == torch.float64 else values.float()
        price = torch.as_tensor(1.0 if costs is None else costs, dtype=precise.dtype, device=precise.device)
        if price.numel() != 1:
            price = price.expand_as(precise)
        budget, sharpness = (
            torch.as_tensor(t, dtype=torch.float64, device=precise.device) for t in (k, beta)
        )
        # kernels/soft_topk/shift.py
        shift = torch.ops.fxsparse.soft_topk_shift([precise], [price], budget, sharpness)
        return torch.sigmoid(precise * (sharpness.to(precise.dtype) / price) + shift.to(precise.dtype))


def _check_topk(
    values: Tensor, k: float | Tensor, costs: Tensor | float | None, beta: float | Tensor
) -> None:
    """Raise NumericsError for arguments out of range; a compiled graph, which looks at no numbers, goes unchecked."""
    if torch.compiler.is_compiling():
        return
    low, high = values.detach().aminmax() if values.numel() else values.new_zeros(2)
    if not bool(low.isfinite() & high.isfinite()):
        raise NumericsError(f"soft_topk: expected finite values, got some from {low:g} to {high:g}.")
    _check_scalar("k", k, math.inf)
    _check_scalar("beta", beta, torch.finfo(torch.float64).max)
    price = torch.as_tensor(1.0 if costs is None else costs).detach()
    shape, whole = list(price.shape), list(values.shape)
    if len(shape) > len(whole) or any(
        a not in (1, b) for a, b in zip(shape[::-1], whole[::-1], strict=False)
    ):
        raise NumericsError(f"soft_topk: expected costs that broadcast to {whole}, got shape {shape}.")
    if not bool(((price > 0) & price.isfinite()).all()):
        low, high = price.aminmax()
        raise NumericsError(
            f"soft_topk: expected finite costs above 0, got some from {low:g} to {high:g}. Leave out what is free."
        )


def _check_scalar(name: str, number: float | Tensor, most: float) -> None:
    scalar = not isinstance(number, Tensor) or number.numel() == 1
    value = float(number.detach() if isinstance(number, Tensor) else number) if scalar else math.nan
    if not 0 <= value <= most:
        got = f"a tensor of shape {list(torch.as_tensor(number).shape)}" if not scalar else value
        raise NumericsError(
            f"soft_topk: expected {name} as one number >= 0{', finite' * (most < math.inf)}, got {got}."
        )


def sinkhorn_topk(
    values: Tensor, k: float, costs: Tensor | None = None, beta: float = 20.0, iterations: int = 100
) -> Tensor:
    """The mask of `soft_topk` as the paper comes to it, for comparison: its algorithm 4, without a gradient.

    Every iteration is ``shift += log(k / cost of the mask)``; near the end an error shrinks by
    ``(costs * mask ** 2).sum() / k`` each time, which is slow where the mask is sharp.
    """
    price = torch.ones_like(values) if costs is None else costs.expand_as(values)
    utility, shift = beta * values / price, values.new_zeros(())
    for _ in range(iterations):
        log_cost = torch.logsumexp((price.log() + F.logsigmoid(utility + shift)).flatten(), 0)
        shift = shift + math.log(k) - log_cost
    return torch.sigmoid(utility + shift)


def refuse_nan(scores: Tensor) -> None:
    """NumericsError where there is one."""
    # amax hands a NaN through, at a ninth of the time of isnan().any().
    if scores.numel() and scores.amax().isnan():
        _raise_nan(scores)


def _raise_nan(scores: Tensor) -> NoReturn:
    bad = scores.isnan().flatten()
    raise NumericsError(
        f"expected scores without NaN, got {int(bad.sum())} NaN among {scores.numel()}, the first at "
        f"flat position {int(bad.nonzero()[0])}. The weights or gradients have diverged: "
        "look at the loss and the learning rate before this step."
    )


def _top_of_rows(scores: Tensor, n: int) -> Tensor:
    """Mask of the `n` largest of every row of a matrix."""
    if not scores.is_cpu:
        wanted = torch.full((), n, dtype=torch.int64, device=scores.device)
        mask, has_nan = torch.ops.fxsparse.top_of_rows(scores, wanted)  # kernels/top_mask/select.py
        if has_nan:
            _raise_nan(scores)
        return mask
    refuse_nan(scores)
    return _top_of_rows_on_cpu(scores, n)


def _top_of_rows_on_cpu(scores: Tensor, n: int) -> Tensor:
    """By the row's n-th largest score as a threshold."""
    rows, columns = scores.shape
    if n <= 0 or not rows:
        return torch.zeros_like(scores, dtype=torch.bool)
    if n >= columns:
        return scores > -torch.inf
    threshold = _nth_largest(scores, n)
    mask = scores >= threshold
    if int(torch.count_nonzero(mask)) > rows * n:
        mask = scores > threshold
        ties = scores == threshold
        missing = n - mask.sum(1, keepdim=True)
        mask |= ties & (ties.cumsum(1) <= missing)
    return mask & (scores > -torch.inf)


def _nth_largest(scores: Tensor, n: int) -> Tensor:
    """The n-th largest of every row, [rows, 1]."""
    # NumPy's vectorised quickselect takes 3 ms for 2.4 M floats, torch.kthvalue 26 and torch.topk 46.  It
    # has no bfloat16; widening is exact.
    place = scores.shape[1] - n
    exact = scores.float() if scores.element_size() < 4 else scores
    column = np.partition(exact.numpy(), place, axis=1)[:, place : place + 1].copy()
    return torch.from_numpy(column).to(scores.dtype)


def _top_by_rank(scores: Tensor, n: int) -> Tensor:
    """Mask of the `n` largest along the short first dimension: compare every pair and count defeats."""
    scores = scores.contiguous()
    defeats = torch.zeros(scores.shape, dtype=torch.uint8, device=scores.device)
    for distance in range(1, len(scores)):
        lower_wins = (scores[:-distance] >= scores[distance:]).view(torch.uint8)
        defeats[distance:] += lower_wins
        defeats[:-distance] += 1 - lower_wins
    return (defeats < max(0, min(n, len(scores)))) & (scores > -torch.inf)
