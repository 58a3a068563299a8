"""N:M: at most N nonzeros in every aligned group of M inputs, as N values of each group and their places in it.

Strided 1:M (`strided.pack_rows`) has other groups, {g, g + C/M, g + 2 C/M, ...} of C inputs; all else is the same.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxsparse.errors import PatternError

GROUPS = (4, 8, 16)
"""The M that are looked for."""


def group_of(mask: Tensor, sizes: Sequence[int] = GROUPS) -> tuple[int, int] | None:
    """The (N, M) with M of `sizes` that `mask` [out, in] keeps and that stores least; None where N is above M / 2.

    N is at least 1; of equals the smaller M.
    """
    found = [(most_in_group(mask, m), m) for m in sizes if mask.numel() and mask.shape[1] % m == 0]
    return min((pair for pair in found if 2 * pair[0] <= pair[1]), key=lambda p: p[0] / p[1], default=None)


def most_in_group(mask: Tensor, m: int) -> int:
    """The most ones that a group of `m` inputs has, at least 1."""
    return max(1, int(mask.unflatten(1, (-1, m)).sum(2).max())) if mask.numel() else 1


def pack(weight: Tensor, group: tuple[int, int] | None = None) -> Mapping[str, Tensor]:
    """The groups of a `weight` [out, in] in the `group` (N, M), by default that of `group_of`.

    ``values`` [out, groups * N] in the weight's dtype, ``positions`` uint8 [out, groups * N], where in its group of M
    inputs a value is, ascending in every group, and ``group`` uint8 [0, N, M], which only says the sizes: to read them
    asks nothing of a device.  A group with fewer nonzeros has zeros at its lowest free places.

    Raises:
        PatternError: a group with more than N nonzeros, or inputs that are no multiple of M.
    """
    group = group_of(weight != 0) if group is None else check(weight, *group)
    if group is None:
        raise PatternError(
            f"N:M needs at most M / 2 nonzeros in every group of M inputs, M of {GROUPS}: a weight "
            f"{list(weight.shape)} with {int((weight != 0).sum())} nonzeros has more. Project its mask with "
            "NM(n, m).project, or use CSR."
        )
    n, m = group
    groups = weight.unflatten(1, (-1, m))
    # A stable sort leaves nonzeros, and behind them the free places, ascending.
    chosen = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[..., :n].sort(2).values
    return {
        "values": groups.gather(2, chosen).flatten(1).contiguous(),
        "positions": chosen.to(torch.uint8).flatten(1).contiguous(),
        "group": torch.empty(0, n, m, dtype=torch.uint8, device=weight.device),
    }


def sizes_of(group: Tensor) -> tuple[int, int, bool]:
    """N, M, and whether groups are strided."""
    return group.shape[1], group.shape[2], group.dim() == 4


def to_dense(values: Tensor, positions: Tensor, group: Tensor) -> Tensor:
    """The weight [out, in] that `pack` or ``strided.pack_rows`` took apart; differentiable in `values`."""
    n, m, is_strided = sizes_of(group)
    groups = values.unflatten(1, (-1, n))
    dense = groups.new_zeros(*groups.shape[:2], m)
    dense = dense.scatter(2, positions.unflatten(1, (-1, n)).long(), groups)
    return (dense.transpose(1, 2) if is_strided else dense).flatten(1)


def check(weight: Tensor, n: int, m: int) -> tuple[int, int]:
    """(N, M); PatternError unless `weight` [out, in] has at most N nonzeros in every aligned group of M inputs.

    M is a power of 2: kernels take no other.
    """
    if m < 1 or m & (m - 1):
        raise PatternError(f"expected N:M with M a power of 2, got {n}:{m}. Use CSR.")
    if weight.shape[1] % m or most_in_group(weight != 0, m) > n:
        raise PatternError(
            f"expected at most {n} nonzeros in every aligned group of {m} inputs, got a weight {list(weight.shape)} "
            f"with more, or with a broken group. Project its mask with NM({n}, {m}).project, or ask for no group."
        )
    return n, m
