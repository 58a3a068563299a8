"""Plots of spectral quantities: by layer, and over training."""

import math
from collections.abc import Mapping
from typing import Any

from fxsparse.figure import empty_figure, svg

Row = dict[str, Any]
PANELS = {
    "ramanujan_gap": "Ramanujan gap",
    "iterative_ramanujan_gap": "iterative Ramanujan gap",
    "weighted_spectral_gap": "weighted spectral gap",
    "full_spectrum_distance": "full-spectrum distance",
}
NAME = 40
"""Characters of a name that are shown, its last ones."""


def draw_layers(rows: list[Row]) -> bytes:
    """Ramanujan gap of every weight, from the first row of its name to the last, beside that of a random mask."""
    first = {row["name"]: row for row in reversed(rows)}
    last = {row["name"]: row for row in rows}
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = empty_figure(8.0, 1.3 + 0.17 * len(names))
    axes = figure.subplots()
    lines = range(len(names))
    random = [_number(last[name]["random_gap"]) for name in names]
    before = [_number(first[name]["ramanujan_gap"]) for name in names]
    after = [_number(last[name]["ramanujan_gap"]) for name in names]
    axes.hlines(lines, before, after, color="tab:blue", linewidth=1)
    axes.scatter(random, lines, marker="|", s=50, color="gray", label="random mask, in the limit")
    steps = (min(row["step"] for row in rows), max(row["step"] for row in rows))
    if steps[0] != steps[1]:
        axes.scatter(before, lines, s=14, facecolors="white", edgecolors="tab:blue", label=f"step {steps[0]}")
    axes.scatter(after, lines, s=14, color="tab:blue", label=f"step {steps[1]}")
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(list(lines), [name if len(name) <= NAME else "…" + name[-NAME:] for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("Ramanujan gap; a graph right of 0 is Ramanujan-like", fontsize=8)
    figure.legend(fontsize=7, ncols=3, loc="outside upper left")
    return svg(figure)


def draw_training(rows: list[Row], means: Mapping[int, Mapping[str, float | None]]) -> bytes:
    """One panel for each quantity: every weight as a thin line over steps, the mean as a thick one."""
    weights: dict[str, list[Row]] = {}
    for row in rows:
        weights.setdefault(row["name"], []).append(row)
    figure = empty_figure(10.0, 5.0)
    for axes, (quantity, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for of_weight in weights.values():
            values = [_number(row[quantity]) for row in of_weight]
            axes.plot([row["step"] for row in of_weight], values, color="tab:blue", linewidth=0.5, alpha=0.4)
        mean = [_number(at[quantity]) for at in means.values()]
        axes.plot(list(means), mean, "o-", color="black", markersize=3, linewidth=1.2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=7)
    return svg(figure)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
