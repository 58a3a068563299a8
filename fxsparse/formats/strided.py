"""Strided 1:M: a row of C entries has at most one of each of the C / M groups {g, g + C/M, g + 2 C/M, ...}.

Sorted by groups its columns are those of 1:M, for a CPU in the layout of `nm_lanes`: chunks of 16 places hold 16 // M
groups, M places each.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.errors import PatternError
from fxsparse.formats import nm, nm_lanes

MOST = nm_lanes.INPUTS
"""The largest M that a chunk has places for."""


def strides_of(mask: Tensor) -> int | None:
    """The largest M from 2 to 16 such that no group of `mask` [out, in] has two entries; None without any."""
    rows, width = mask.shape
    if mask.numel() == 0:
        return None
    most = min(MOST, width // max(1, int(mask.sum(1).max())))
    sizes = [m for m in range(most, 1, -1) if width % m == 0]
    return next((m for m in sizes if _fits(mask[: min(32, rows)], m) and _fits(mask, m)), None)


def exact_strides(columns: Tensor, fan_in: int, width: int) -> int | None:
    """The M of rows that have exactly one entry of every group, whatever its size; None for any other.

    `columns` [rows * fan_in] are those of one nonempty row after another.  Rows that are full or have a single entry
    are no strided ones: the pattern would fit every such row.
    """
    if fan_in < 2 or width % fan_in or width == fan_in:
        return None
    groups = (columns.long() % fan_in).reshape(-1, fan_in).sort(1).values
    found = bool((groups == torch.arange(fan_in, device=columns.device)).all())
    return width // fan_in if found else None


def pack(weight: Tensor) -> Mapping[str, Tensor]:
    """``values`` and ``places`` of `nm_lanes.pack` for the columns of a `weight` [out, in] as `columns_of` sorts them.

    ``dense`` uint8 [0, out, in, M] only says the shape and M, that of `strides_of`.

    PatternError where that is None.
    """
    m = strides_of(weight != 0)
    if m is None:
        raise PatternError(
            f"strided needs at most one nonzero of every M inputs that are in / M apart, M from 2 to {MOST}: a weight "
            f"{list(weight.shape)} with {int((weight != 0).sum())} nonzeros has more. Project its mask with "
            "Strided(m).project, or use CSR."
        )
    out_features, in_features = weight.shape
    packed = nm_lanes.pack(F.pad(weight, (0, 1))[:, columns_of(in_features, m)])
    return {
        "values": packed["values"],
        "places": packed["places"],
        "dense": torch.empty(0, out_features, in_features, m, dtype=torch.uint8),
    }


def to_dense(values: Tensor, places: Tensor, dense: Tensor) -> Tensor:
    """The weight [out, in] that `pack` took apart; differentiable in `values`."""
    out_features, in_features, m = dense.shape[1:]
    columns = columns_of(in_features, m).to(values.device)
    sorted_ = nm_lanes.to_dense(values, places, dense.new_empty(0, out_features, len(columns)))
    return sorted_.new_zeros(out_features, in_features + 1).index_copy(1, columns, sorted_)[:, :in_features]


def pack_rows(weight: Tensor, m: int | None = None) -> Mapping[str, Tensor]:
    """What ``nm.pack`` makes of a `weight` [out, in] with strided groups, `m` by default that of `strides_of`.

    ``group`` is uint8 [0, 1, M, 2] then, by which ``nm.sizes_of`` tells it.

    PatternError for other zeros.
    """
    m = strides_of(weight != 0) if m is None else m
    if m is None or m & (m - 1) or weight.shape[1] % m or not _fits(weight != 0, m):
        raise PatternError(
            f"expected strided 1:M zeros with M a power of 2, got a weight {list(weight.shape)} with "
            f"{int((weight != 0).sum())} nonzeros and M {m}. Project its mask with Strided(4).project, or use CSR."
        )
    packed = nm.pack(weight.unflatten(1, (m, -1)).transpose(1, 2).flatten(1), (1, m))
    return {**packed, "group": torch.empty(0, 1, m, 2, dtype=torch.uint8, device=weight.device)}


def columns_of(in_features: int, m: int) -> Tensor:
    """The column of every place, int64 [chunks * 16]; `in_features` where a place stays free.

    The next 16 * bands groups make 16 chunks, where a chunk has ``bands = 16 // m`` groups; the last groups make fewer.
    Chunk j has group j of every band, so that the inputs of one place of the 16 chunks are neighbours, and one
    transposition makes chunks of them.
    """
    groups, bands = in_features // m, MOST // m
    chunks = []
    for first in range(0, groups, MOST * bands):
        many = min(MOST, -(-(groups - first) // bands))
        group = first + torch.arange(many)[:, None] + many * torch.arange(bands)
        column = group[:, :, None] + groups * torch.arange(m)
        column = torch.where(group[:, :, None] < groups, column, in_features).flatten(1)
        chunks.append(F.pad(column, (0, MOST - m * bands), value=in_features))
    return torch.cat(chunks).flatten() if chunks else torch.zeros(0, dtype=torch.int64)


def _fits(mask: Tensor, m: int) -> bool:
    return int(mask.unflatten(1, (m, -1)).sum(1).max()) <= 1
