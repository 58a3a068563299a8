"""What the GPU kernels are to reach, beside what they reached; every number is one of the cell's graphs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.cells import Cell
from benchmarks.gpu.rivals import OURS, ours

_CSR = ("cuSPARSE CSR", "cuSPARSE CSR @ x^T")
_TORCH_BLOCKS = ("torch BSR", "torch Triton", "torch Triton, x^T as a view")
_SEMI = ("cuSPARSELt", "cuSPARSELt, searched", "CUTLASS", f"{OURS}cuda-nm")


def asked(part: str, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A line for each aim and cell: the least that is asked for, what came, and whether that is enough."""
    found = []
    for cell in cells:
        if "failed" not in cell.result:
            found += [_line(cell, *aim) for aim in _aims(part, cell.settings, cell.result)]
    return found


def _aims(part: str, settings: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[tuple]:
    """(What, at least, what came or None where it was not measured)."""
    us = result.get("us", {})
    if part == "layer" and settings["rows"] < settings["out"]:
        yield "times dense fp32", 1.0, _times(us, ["dense"])
        yield "times cuSPARSE CSR", 1.0, _times(us, _CSR)
        yield "of the gathers' limit, L2", 0.5, _share(result, "L2")
    if part == "decode":
        yield "times cuBLAS bf16", 3.5, _times(us, ["dense"])
        yield "of the memory's limit", 0.65, _share(result, "DRAM")
    if part == "blocks" and settings["block"] == 64:
        yield "times cuBLAS", 2.5 if settings["backward"] else 4.0, _times(us, ["dense"])
        if not settings["backward"]:
            yield "times torch's own", 1.0, _times(us, _TORCH_BLOCKS)
    if part == "semi":
        best = _least(us, _SEMI)
        yield "2:4, times dense", 1.3, us["dense"][2] / best if best and "dense" in us else None
    if part == "updates":
        yield "1 - share of updates", 0.97, 1 - result["share"]


def _line(cell: Cell, what: str, least: float, came: float | None) -> dict[str, Any]:
    label = " ".join(str(v) for name, v in cell.settings.items() if name not in ("part", "device"))
    met = "not measured" if came is None else "yes" if came >= least else "NO"
    return {"cell": label, "asked for": what, "at least": least, "got": came, "met": met}


def _times(us: Mapping[str, Sequence[float]], rivals: Sequence[str]) -> float | None:
    """How many times faster our fastest kernel is than the fastest of these."""
    best, theirs = ours(us), _least(us, rivals)
    return theirs / best if best and theirs else None


def _share(result: Mapping[str, Any], level: str) -> float | None:
    """Of the limit, that our fastest kernel reaches."""
    found = {name: s[2] for name, s in result["us"].items() if name.startswith(OURS)}
    name = min(found, key=found.__getitem__, default=None)
    return None if name is None else result["limits"][level][name] / found[name]


def _least(us: Mapping[str, Sequence[float]], names: Sequence[str]) -> float | None:
    return min((us[name][2] for name in names if name in us), default=None)
