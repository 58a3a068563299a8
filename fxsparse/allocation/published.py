"""Budgets of ResNet-50 that papers found, layer by layer, as tables for ``Plan(allocation=...)``."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from fxsparse.errors import PlanError

FILE = Path(__file__).with_name("resnet50.toml")
"""Its head says where the numbers come from."""


def published(name: str) -> dict[str, float]:
    """{weight of torchvision's resnet50: sparsity}, all 54 of them, for ``Plan(allocation=published("str-90.23"))``.

    The table decides, whatever the plan's sparsity is: give the plan the same, as reports compare with it.

    `name`: "str-" and the percentage of zeros, for the 16 budgets that STR learned (Kusupati et al. 2020,
    arXiv:2002.03231); or "uniform-90", "erk-90", "snfs-90", "vd-90" (variational dropout) and "gs-90" (global
    sparsity), which it compares with.

    Raises:
        PlanError: an unknown name; the message lists the known ones.
    """
    tables = _read()
    known = tables["sparsity"]
    if name not in known:
        raise PlanError(f"published: expected one of {', '.join(known)}, got {name!r}.")
    return {
        f"{layer}.weight": zeros / 100 for layer, zeros in zip(tables["layers"], known[name], strict=True)
    }


@cache
def _read() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))
