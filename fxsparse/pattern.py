"""The constraint on a mask, apart from how it is stored.

A weight is read as a matrix [output rows, fan-in]: dimension 0 is the row.  Groups and blocks run along the input
channels, dimension 1, as hardware needs them, at one kernel position of a convolution at a time (the matrix of a
[out, in, kh, kw] weight is its permutation to [out, kh, kw, in]); strides run through the flattened row.  Ties go to
the lower flat index of the weight's own layout.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fxsparse.blocks import Grid
from fxsparse.errors import PatternError
from fxsparse.selection import to_positions
from fxsparse.topk import top_mask, top_of_tiles

Tiles = Iterable[tuple[int, Tensor]]
"""(first row, scores [rows, fan_in]) in ascending row order, the rows of one weight exactly once."""


class Pattern(Protocol):
    """Which masks are allowed.  A frozen dataclass; its fields are its options."""

    row_local: ClassVar[bool]
    """Rows choose on their own, so that a score may be projected row tile by row tile."""

    streams: ClassVar[bool]
    """`project_tiles` never holds a whole weight.  A pattern that does not stream needs masked storage."""

    def feasible(self, shape: Sequence[int], nnz: int) -> int:
        """The allowed count nearest to and not above `nnz`; PatternError where the shape does not fit."""
        ...

    def project(self, score: Tensor, nnz: int) -> Tensor:
        """Bool mask of the score's shape with exactly ``feasible(shape, nnz)`` ones at the largest scores.

        +inf forces an entry in, -inf keeps it out; PatternError where too many are kept out.
        """
        ...

    def project_tiles(self, tiles: Tiles, shape: Sequence[int], nnz: int) -> Tensor:
        """Flat positions (int64, ascending) of `project` of the joined tiles, ties included."""
        ...

    def prune(self, score: Tensor, active: Tensor, shape: Sequence[int], keep: int) -> Tensor:
        """Bool [nnz]: at most `keep` of the entries at the largest scores [nnz], in whole units (entries or blocks).

        `active` are the flat positions (int64 [nnz], ascending) of the entries in a weight of `shape`.  Quotas of rows
        and groups are ignored.
        """
        ...

    def check(self, mask: Tensor) -> None:
        """Raise PatternError naming the first row or group that breaks the pattern."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Any mask: the `nnz` largest scores of the weight."""

    row_local: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    def feasible(self, shape: Sequence[int], nnz: int) -> int:
        return min(_count(nnz), prod(shape))

    def project(self, score: Tensor, nnz: int) -> Tensor:
        return _exact(top_mask(score, nnz), self.feasible(score.shape, nnz), self)

    def project_tiles(self, tiles: Tiles, shape: Sequence[int], nnz: int) -> Tensor:
        fan_in = prod(shape[1:])
        positions = top_of_tiles(((first * fan_in, scores) for first, scores in tiles), nnz)
        _exact(positions, self.feasible(shape, nnz), self)
        return positions

    def prune(self, score: Tensor, active: Tensor, shape: Sequence[int], keep: int) -> Tensor:
        return top_mask(score, keep)

    def check(self, mask: Tensor) -> None:
        del mask


@dataclass(frozen=True)
class ConstantFanIn:
    """As many ones in every row: ``nnz // rows``, or `fan_in` whatever the nnz.

    `check` lets a row without any one pass: an ablated neuron (SRigL, arXiv:2305.02299).
    """

    fan_in: int | None = None
    row_local: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.fan_in is not None:
            _positive("ConstantFanIn", fan_in=self.fan_in)

    def feasible(self, shape: Sequence[int], nnz: int) -> int:
        rows, columns = _matrix(shape)
        k = min(_count(nnz) // rows, columns) if self.fan_in is None else self.fan_in
        if k > columns:
            raise PatternError(
                f"expected a fan-in of at most {columns} for shape {list(shape)}, got {self}. Lower it."
            )
        return k * rows

    def project(self, score: Tensor, nnz: int) -> Tensor:
        total = self.feasible(score.shape, nnz)
        matrix = score.reshape(len(score), -1)
        return _exact(top_mask(matrix, total // len(score), dim=1), total, self).view(score.shape)

    def project_tiles(self, tiles: Tiles, shape: Sequence[int], nnz: int) -> Tensor:
        return _project_row_tiles(self, tiles, shape, nnz)

    def prune(self, score: Tensor, active: Tensor, shape: Sequence[int], keep: int) -> Tensor:
        return top_mask(score, keep)

    def check(self, mask: Tensor) -> None:
        counts = mask.reshape(len(mask), -1).sum(1)
        allowed = self.fan_in
        if allowed is None:
            filled = counts[counts > 0]
            allowed = int(filled[0]) if len(filled) else 0
        row = _first((counts != allowed) & (counts > 0))
        if row is not None:
            raise PatternError(
                f"expected {allowed} ones in every row that has any, got {int(counts[row])} in row {row}. "
                "Project the mask with ConstantFanIn().project, or use Unstructured()."
            )


@dataclass(frozen=True)
class NM:
    """`n` ones in every group of `m` consecutive input channels, whatever the nnz asked for.

    `check` lets groups with fewer ones pass, as the hardware does.
    """

    n: int
    m: int
    row_local: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("NM", n=self.n, m=self.m)
        if self.n > self.m:
            raise PatternError(f"expected n <= m, got NM(n={self.n}, m={self.m}). 2:4 is NM(2, 4).")

    def feasible(self, shape: Sequence[int], nnz: int) -> int:
        _count(nnz)
        self._groups(shape)
        return prod(shape) // self.m * self.n

    def project(self, score: Tensor, nnz: int) -> Tensor:
        total = self.feasible(score.shape, nnz)
        mask = top_mask(score.reshape(self._groups(score.shape)), self.n, dim=2)
        return _exact(mask, total, self).reshape(score.shape)

    def project_tiles(self, tiles: Tiles, shape: Sequence[int], nnz: int) -> Tensor:
        return _project_row_tiles(self, tiles, shape, nnz)

    def prune(self, score: Tensor, active: Tensor, shape: Sequence[int], keep: int) -> Tensor:
        return top_mask(score, keep)

    def check(self, mask: Tensor) -> None:
        counts = mask.reshape(self._groups(mask.shape)).sum(2)
        place = _first(counts > self.n)
        if place is not None:
            row, group, kernel = torch.unravel_index(torch.tensor(place), counts.shape)
            first = int(group) * self.m
            raise PatternError(
                f"expected at most {self.n} ones in {self.m} input channels, "
                f"got {int(counts[row, group, kernel])} "
                f"in row {int(row)}, channels {first} to {first + self.m - 1}"
                + (f", kernel position {int(kernel)}. " if counts.shape[2] > 1 else ". ")
                + f"Project the mask with NM({self.n}, {self.m}).project."
            )

    def _groups(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """[rows, groups, m, kernel positions]."""
        _matrix(shape)
        _divides("in_features", shape[1], self.m, f"{self.n}:{self.m}")
        return shape[0], shape[1] // self.m, self.m, prod(shape[2:])


@dataclass(frozen=True)
class Strided:
    """Strided 1:M: one of the `m` entries that lie a stride apart in a row, whatever the nnz asked for.

    A row flattened to C entries (channels x kernel) has C / m groups {g, g + C/m, g + 2 C/m, ...}: our reading of
    Complementary Sparsity (Zhao et al. 2023).  `check` lets groups without any one pass, as `NM` does.
    """

    m: int
    row_local: ClassVar[bool] = True
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("Strided", m=self.m)

    def feasible(self, shape: Sequence[int], nnz: int) -> int:
        _count(nnz)
        self._groups(shape)
        return prod(shape) // self.m

    def project(self, score: Tensor, nnz: int) -> Tensor:
        total = self.feasible(score.shape, nnz)
        mask = top_mask(score.reshape(self._groups(score.shape)), 1, dim=1)
        return _exact(mask, total, self).reshape(score.shape)

    def project_tiles(self, tiles: Tiles, shape: Sequence[int], nnz: int) -> Tensor:
        return _project_row_tiles(self, tiles, shape, nnz)

    def prune(self, score: Tensor, active: Tensor, shape: Sequence[int], keep: int) -> Tensor:
        return top_mask(score, keep)

    def check(self, mask: Tensor) -> None:
        counts = mask.reshape(self._groups(mask.shape)).sum(1)
        place = _first(counts > 1)
        if place is not None:
            stride = counts.shape[1]
            row, first = divmod(place, stride)
            raise PatternError(
                f"expected at most 1 one in {self.m} entries {stride} apart, got {int(counts[row, first])} in row "
                f"{row}, entries {first}, {first + stride} and so on. Project the mask with Strided({self.m}).project."
            )

    def _groups(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """[rows, m, groups]."""
        rows, fan_in = _matrix(shape)
        _divides(f"entries in a row of {list(shape)}", fan_in, self.m, f"Strided({self.m})")
        return rows, self.m, fan_in // self.m


@dataclass(frozen=True)
class Block:
    """Whole blocks of `rows` outputs x `cols` input channels, ranked by the sum of their scores."""

    rows: int
    cols: int
    row_local: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _positive("Block", rows=self.rows, cols=self.cols)

    def feasible(self, shape: Sequence[int], nnz: int) -> int:
        size = self._grid(shape).entries
        return min(_count(nnz), prod(shape)) // size * size

    def project(self, score: Tensor, nnz: int) -> Tensor:
        total, grid = self.feasible(score.shape, nnz), self._grid(score.shape)
        chosen = top_mask(grid.sums([score.flatten(1)]), total // grid.entries).view(grid.size)
        mask = chosen[:, None, :, None].expand(grid.tiled(score).shape).reshape(score.shape)
        return _exact(mask, total, self)

    def project_tiles(self, tiles: Tiles, shape: Sequence[int], nnz: int) -> Tensor:
        total, grid = self.feasible(shape, nnz), self._grid(shape)
        chosen = top_mask(grid.sums(scores for _, scores in tiles), total // grid.entries)
        return _exact(grid.positions(to_positions(chosen)), total, self)

    def prune(self, score: Tensor, active: Tensor, shape: Sequence[int], keep: int) -> Tensor:
        """Blocks that are not active as a whole are not kept."""
        grid = self._grid(shape)
        return top_mask(grid.sums_at(score, active), keep // grid.entries)[grid.numbers(active)]

    def check(self, mask: Tensor) -> None:
        counts, size = self._grid(mask.shape).tiled(mask).sum((1, 3)), self.rows * self.cols
        place = _first((counts > 0) & (counts < size))
        if place is not None:
            row, column, kernel = torch.unravel_index(torch.tensor(place), counts.shape)
            raise PatternError(
                f"expected blocks of {self.rows} x {self.cols} that are all ones or all zeros, got "
                f"{int(counts[row, column, kernel])} ones of {size} "
                f"in the block at row {int(row) * self.rows}, channel {int(column) * self.cols}"
                + (f", kernel position {int(kernel)}. " if counts.shape[2] > 1 else ". ")
                + f"Project the mask with Block({self.rows}, {self.cols}).project."
            )

    def _grid(self, shape: Sequence[int]) -> Grid:
        _matrix(shape)
        _divides("out_features", shape[0], self.rows, f"Block({self.rows}, {self.cols})")
        _divides("in_features", shape[1], self.cols, f"Block({self.rows}, {self.cols})")
        return Grid(shape, self.rows, self.cols)


def _project_row_tiles(pattern: Pattern, tiles: Tiles, shape: Sequence[int], nnz: int) -> Tensor:
    per_row = pattern.feasible(shape, nnz) // shape[0]
    fan_in = prod(shape[1:])
    return torch.cat(
        [
            to_positions(pattern.project(scores.reshape(-1, *shape[1:]), per_row * len(scores)))
            + first * fan_in
            for first, scores in tiles
        ]
    )


def row_tiles(shape: Sequence[int], share: int = 16) -> Iterator[tuple[int, int]]:
    """(first row, rows) of tiles that hold at most ``1 / share`` of a weight, and never less than a row."""
    height = max(1, shape[0] // share)
    for first in range(0, shape[0], height):
        yield first, min(height, shape[0] - first)


def _exact(chosen: Tensor, expected: int, pattern: Pattern) -> Tensor:
    got = len(chosen) if chosen.dtype == torch.int64 else int(torch.count_nonzero(chosen))
    if got != expected:
        raise PatternError(
            f"expected {expected} entries for {pattern}, got only {got} with a score above -inf. "
            "Keep fewer entries out, or ask for fewer nonzeros."
        )
    return chosen


def _first(bad: Tensor) -> int | None:
    """Flat index of the first true entry."""
    return int(places[0]) if len(places := to_positions(bad)) else None


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2 or not all(shape):
        raise PatternError(
            f"expected a weight of at least 2 dimensions, none of them 0, got shape {list(shape)}. "
            "Exclude this weight."
        )
    return shape[0], prod(shape[1:])


def _count(nnz: int) -> int:
    if nnz < 0:
        raise PatternError(f"expected nnz >= 0, got {nnz}.")
    return nnz


def _positive(owner: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise PatternError(f"{owner}: expected {name} as an integer >= 1, got {number!r}.")


def _divides(what: str, width: int, step: int, pattern: str) -> None:
    if width % step:
        raise PatternError(
            f"{what}={width}; {pattern} needs a multiple of {step}. "
            "Exclude this weight, or, where the method trains any pattern, give it Unstructured() by an Override."
        )


PATTERNS: dict[str, type] = {
    "unstructured": Unstructured,
    "constant_fan_in": ConstantFanIn,
    "nm": NM,
    "block": Block,
    "strided": Strided,
}
"""The names that plan files use; a pattern of another package adds itself here."""


def to_dict(pattern: Pattern) -> dict[str, Any]:
    """``{"name": ..., field: value}`` for `from_dict`; unset fields are left out."""
    names = {cls: name for name, cls in PATTERNS.items()}
    if type(pattern) not in names:
        raise PatternError(
            f"{pattern!r} has no name in fxsparse.pattern.PATTERNS: add its class to write it to a plan file."
        )
    return {"name": names[type(pattern)]} | {k: v for k, v in vars(pattern).items() if v is not None}


def from_dict(fields: Mapping[str, Any]) -> Pattern:
    """The inverse of `to_dict`; PatternError for an unknown name, or an unknown or missing field."""
    options = dict(fields)
    name = options.pop("name", None)
    cls = PATTERNS.get(name) if isinstance(name, str) else None
    if cls is None:
        raise PatternError(
            f"expected a pattern with name= one of {', '.join(PATTERNS)}, got {dict(fields)!r}."
        )
    parameters = inspect.signature(cls).parameters
    known = list(parameters)
    if not set(options) <= set(known):
        raise PatternError(f"pattern {name!r} takes {known or 'no fields'}, got {sorted(options)}.")
    missing = [
        key for key in known if key not in options and parameters[key].default is inspect.Parameter.empty
    ]
    if missing:
        raise PatternError(
            f"pattern {name!r} needs {known}, got {sorted(options)}: give {', '.join(missing)}."
        )
    return cls(**options)
