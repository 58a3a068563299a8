"""Transformations as plain values and back."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fxsparse.errors import PlanError
from fxsparse.transforms.sparse_doped import SparseDoped
from fxsparse.transforms.sparse_factorized import SparseFactorized
from fxsparse.transforms.sparse_parallel import SparseParallel
from fxsparse.transforms.sparse_wide import SparseWide

Transform = SparseWide | SparseParallel | SparseFactorized | SparseDoped

TRANSFORMS: dict[str, type[Transform]] = {
    kind.name: kind for kind in (SparseWide, SparseParallel, SparseFactorized, SparseDoped)
}


def to_dict(transform: Transform) -> dict[str, Any]:
    """``{"name": ..., field: value, ...}``; fields at their default are left out."""
    given = {f.name: getattr(transform, f.name) for f in fields(transform)}
    changed = {f.name: given[f.name] for f in fields(transform) if given[f.name] != f.default}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    return {"name": transform.name, **plain}


def from_dict(row: Mapping[str, Any]) -> Transform:
    """The inverse of `to_dict`; PlanError for an unknown name or field, or a value out of range."""
    row = dict(row)
    name = row.pop("name", None)
    kind = TRANSFORMS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise PlanError(f"transform: expected a name among {', '.join(TRANSFORMS)}, got {name!r}.")
    known = [f.name for f in fields(kind)]
    unknown = [key for key in row if key not in known]
    if unknown:
        raise PlanError(
            f"transform {kind.name!r} has no field {unknown[0]!r}; its fields: {', '.join(known)}."
        )
    return kind(**row)
