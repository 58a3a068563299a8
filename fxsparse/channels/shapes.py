"""How a reshape moves dimensions: which ones it keeps, merges and splits."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import sympy
from torch import SymInt

_PRIMES = (1_000_003, 1_000_033, 1_000_037, 1_000_039)
"""Stand for the symbols of a shape; no size of a model is a multiple of one."""


def matched(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]] | None:
    """Smallest runs of dimensions with equal products, ``(of before, of after)``; dimensions of size 1 are left out.

    None where the sizes do not match up, which is so where they depend on symbols in a way that is not a product.
    """
    symbols = sorted({s for size in (*before, *after) for s in _expression(size).free_symbols}, key=str)
    if len(symbols) > len(_PRIMES):
        return None
    values = dict(zip(symbols, _PRIMES, strict=False))
    a, b = (
        [(k, int(_expression(size).subs(values))) for k, size in enumerate(shape)]
        for shape in (before, after)
    )
    a, b = [p for p in a if p[1] != 1], [p for p in b if p[1] != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while a and b:
        left, right = [a.pop(0)], [b.pop(0)]
        while (x := prod(s for _, s in left)) != (y := prod(s for _, s in right)):
            short, side = (a, left) if x < y else (b, right)
            if not short:
                return None
            side.append(short.pop(0))
        groups.append(([k for k, _ in left], [k for k, _ in right]))
    return None if a or b else groups


def coordinates(sizes: Sequence[int], which: int) -> np.ndarray:
    """Coordinate in dimension `which` of every entry of a tensor of these sizes, in memory order."""
    stride = prod(sizes[which + 1 :])
    return np.arange(prod(sizes)) // stride % sizes[which]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)
