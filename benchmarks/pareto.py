"""Scores by training FLOPs, a panel for each model and sparsity, with every method named.

What is far worse than the rest lies on the edge of the panel, its score beside its name.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cells import Cell

Point = tuple[str, float, float]
"""(label, FLOPs over dense training's, mean score)"""
LOWER_IS_BETTER = ("bytes",)
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Points, their Pareto front, and the names in a column at the right, in the order of the scores."""
    models = list(dict.fromkeys((c.settings["task"], c.settings["model"]) for c in cells))
    levels = sorted({c.settings["sparsity"] for c in cells} - {0.0, 0.5})
    figure = Figure(figsize=(5.6 * len(levels), 5.2 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(levels), squeeze=False)
    for row, (task, model) in zip(panels, models, strict=True):
        for axes, level in zip(row, levels, strict=True):
            of_panel = [c for c in cells if c.settings["model"] == model and _shown(c, level)]
            _panel(axes, points(of_panel), task in LOWER_IS_BETTER)
            axes.set_title(f"{task}, {model}, {level:.0%} of zeros", fontsize=9)
            axes.set_ylabel("bits per byte" if task == "bytes" else "test accuracy (%)", fontsize=8)
    figure.savefig(path, dpi=110)


def points(cells: Sequence[Cell]) -> list[Point]:
    """Means over seeds; what has not the zeros of the panel says its own."""
    found: list[Point] = []
    for method in dict.fromkeys(c.settings["method"] for c in cells):
        results = [c.result for c in cells if c.settings["method"] == method]
        fixed = any(c.settings["sparsity"] == 0.5 for c in cells if c.settings["method"] == method)
        zeros = statistics.mean(r["zeros"] for r in results)
        label = method if results[0]["exact"] and not fixed else f"{method} ({zeros:.0%} zeros)"
        ratio = statistics.mean(r["train_ratio"] for r in results)
        found.append((label, ratio, statistics.mean(r["score"] for r in results)))
    return found


def front(found: Sequence[Point], lower: bool) -> list[Point]:
    """Those that no other beats at the same FLOPs or fewer, by FLOPs."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda p: (p[1], p[2] if lower else -p[2])):
        if not kept or (point[2] < kept[-1][2] if lower else point[2] > kept[-1][2]):
            kept.append(point)
    return kept


def worst_shown(scores: Sequence[float], lower: bool) -> float:
    """Where the axis ends: one and a half of the quartiles' distance beyond them; what is worse is drawn there."""
    if len(scores) < 4:
        return max(scores) if lower else min(scores)
    first, _, third = statistics.quantiles(scores, n=4)
    return third + 1.5 * (third - first) if lower else first - 1.5 * (third - first)


def _shown(cell: Cell, level: float) -> bool:
    return cell.settings["sparsity"] in (0.0, 0.5, level)


def _panel(axes: Axes, found: Sequence[Point], lower: bool) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xlim(0.85 * min(p[1] for p in found), 1.15 * max(p[1] for p in found))
    limit = worst_shown([p[2] for p in found], lower)
    at = [min(p[2], limit) if lower else max(p[2], limit) for p in found]
    axes.scatter([p[1] for p in found], at, s=14, zorder=3)
    best = front(found, lower)
    axes.step([p[1] for p in best], [p[2] for p in best], where="post", linewidth=0.8, color="gray")
    if lower:
        axes.invert_yaxis()
    ordered = sorted(found, key=lambda p: p[2], reverse=not lower)
    for place, (label, ratio, score) in enumerate(ordered):
        is_beyond = score > limit if lower else score < limit
        axes.annotate(
            f"{label}: {score:.1f}" if is_beyond else label,
            (ratio, limit if is_beyond else score),
            xytext=(1.06, 1 - (place + 0.5) / len(ordered)),
            textcoords="axes fraction",
            fontsize=6.5,
            va="center",
            fontweight="bold" if (label, ratio, score) in best else "normal",
            arrowprops={"arrowstyle": "-", "linewidth": 0.3, "color": "gray", "relpos": (0, 0.5)},
        )
    axes.set_xlabel("training FLOPs / dense", fontsize=8)
    axes.tick_params(labelsize=7)
