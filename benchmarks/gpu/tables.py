"""The cells of `benchmarks.gpu` as tables, and what they were asked to show."""

import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.cells import Cell
from benchmarks.gpu.asked import asked
from benchmarks.gpu.chooser import loss
from benchmarks.gpu.rivals import OURS, ours

WITHIN = 1.05
"""Of the fastest candidate's time."""
_NO_LABEL = ("part", "device")


def tables(part: str, cells: Sequence[Cell]) -> str:
    """Every number of a part's cells, and why others are missing."""
    failed = [c for c in cells if "failed" in c.result]
    done = [c for c in cells if "failed" not in c.result]
    if part == "updates":
        rows = [{**_label(c), **c.result} for c in done]
    elif part == "chooser":
        return "\n\n".join([_chooser(done), *([_missing(failed)] if failed else [])])
    else:
        rows = [line for cell in done for line in lines(cell)]
    shown, aims = (
        tabulate(table, headers="keys", floatfmt=".4g", tablefmt="github", missingval="-")
        for table in (rows, asked(part, done))
    )
    return "\n\n".join(text for text in (shown, _missing(cells), aims) if text)


def lines(cell: Cell) -> list[dict[str, Any]]:
    """A line for each rival: times, how many times faster than dense it is and ours than it, and shares of limits."""
    result, label = cell.result, _label(cell)
    us, calls = result["us"], result["calls_us"]
    best, found = ours(us), []
    for name, spread in calls.items():
        graph = us.get(name)
        line = {**label, "rival": name, "graph us": graph and graph[2], "least": graph and graph[0]}
        line["of dense"] = us["dense"][2] / graph[2] if graph and "dense" in us else None
        line["ours of it"] = graph[2] / best if graph and best else None
        for level, limits in result.get("limits", {}).items():
            line[f"of {level}"] = limits[name] / graph[2] if graph and name in limits else None
        line |= {"call us": spread[2], "error": result["errors"][name]}
        found.append(line)
    return found


def _chooser(cells: Sequence[Cell]) -> str:
    """Shares of layers and the worst of them, for calls and for graphs."""
    rows = []
    for name, times in (("calls", "calls_us"), ("graphs", "us")):
        losses = {i: loss(c.result, times) for i, c in enumerate(cells) if _is_timed(c, times)}
        if not losses:
            continue
        best, dense = ([pair[i] for pair in losses.values()] for i in (0, 1))
        worst = max(losses, key=lambda i: losses[i][0])
        row = {"timed as": name, "layers": len(losses)}
        row["within 5 % of the best"] = f"{statistics.fmean(x <= WITHIN for x in best):.1%}"
        row["at most 5 % above dense"] = f"{statistics.fmean(x <= WITHIN for x in dense):.1%}"
        row |= {"worst of best": max(best), "worst of dense": max(dense)}
        row["the worst"] = " ".join(str(v) for v in _label(cells[worst]).values())
        rows.append(row | {"taken there": cells[worst].result["chosen"]})
    return tabulate(rows, headers="keys", floatfmt=".3f", tablefmt="github")


def _is_timed(cell: Cell, times: str) -> bool:
    names = cell.result[times]
    return "dense" in names and (cell.result["chosen"] == "dense" or OURS + cell.result["chosen"] in names)


def _missing(cells: Sequence[Cell]) -> str:
    """What failed, what is not available here, and what no CUDA graph takes."""
    found = []
    for cell in cells:
        label = " ".join(f"{name} {value}" for name, value in _label(cell).items())
        if "failed" in cell.result:
            found.append(f"FAILED: {label}: {cell.result['failed']}")
        for kind, title in (("missing", "not measured"), ("uncaptured", "no graph")):
            reasons = cell.result.get(kind, {})
            found += [f"{title}: {label}: {name}: {why}" for name, why in reasons.items()]
    return "\n".join(found)


def _label(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in cell.settings.items() if name not in _NO_LABEL}
