"""How masks moved, as heat maps: a line per weight, steps from left to right, readable for a hundred weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxsparse.figure import empty_figure, svg

Row = dict[str, Any]
ByWeight = dict[str, list[Row]]

WIDTH = 10.0
LINE = 0.17
"""Inches: of a figure, and of the line of one weight."""
NAME = 40
"""Characters of a name that are shown, its last ones."""


@dataclass(frozen=True)
class _Quantity:
    """What one figure shows."""

    title: str
    value: Callable[[Row, Row], float | None]
    """Colour of a row, given also the first row of its weight; None where it is not known."""
    text: Callable[[Row, Row], str]
    """Written at the end of a weight's line, for its last row."""
    total: Callable[[list[Row]], str]
    """Written above, for the last rows of all weights."""
    colours: str
    from_zero: bool = False
    """Whether the colours begin at 0, and not at the least value."""


def draw(rows: list[Row]) -> dict[str, bytes]:
    """{title: SVG} from the rows of `TopologyHistory`; empty if there are none.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    weights: ByWeight = {}
    for row in rows:
        weights.setdefault(row["name"], []).append(row)
    shown = [q for q in _QUANTITIES if any(q.value(row, row) is not None for row in rows)]
    return {quantity.title: _figure(quantity, weights) for quantity in shown}


def grid(rows: ByWeight, value: Callable[[Row, Row], float | None]) -> tuple[list[int], np.ndarray]:
    """Steps at which any mask moved, and [weights, steps] values that last until the next update; NaN before."""
    steps = sorted({row["step"] for of_weight in rows.values() for row in of_weight})
    column = {step: index for index, step in enumerate(steps)}
    filled = np.full((len(rows), len(steps)), np.nan)
    for line, of_weight in zip(filled, rows.values(), strict=True):
        for row in of_weight:
            known = value(row, of_weight[0])
            line[column[row["step"]] :] = np.nan if known is None else known
    return steps, filled


def _figure(quantity: _Quantity, weights: ByWeight) -> bytes:
    steps, values = grid(weights, quantity.value)
    figure = empty_figure(WIDTH, 1.1 + LINE * len(weights))
    axes = figure.subplots()
    low, high = _range(values, quantity.from_zero)
    # One image inside the SVG: fifty weights at a thousand steps would be as many shapes.
    mesh = axes.pcolormesh(
        _edges(steps),
        np.arange(len(weights) + 1),
        values,
        cmap=quantity.colours,
        vmin=low,
        vmax=high,
        rasterized=True,
    )
    axes.hlines(range(1, len(weights)), *axes.get_xlim(), color="white", linewidth=0.6)
    last = [rows[-1] for rows in weights.values()]
    _name_lines(axes, [name if len(name) <= NAME else "…" + name[-NAME:] for name in weights])
    _name_lines(axes.twinx(), [quantity.text(rows[-1], rows[0]) for rows in weights.values()])
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_title(quantity.total(last), fontsize=9, loc="left")
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30, fraction=0.03)
    bar.ax.tick_params(labelsize=7)
    return svg(figure)


def _name_lines(axes: Any, names: list[str]) -> None:
    """Write a text beside every line of the heat map, the first at the top."""
    axes.set_ylim(len(names), 0)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.tick_params(labelsize=7, length=0)


def _range(values: np.ndarray, from_zero: bool) -> tuple[float, float]:
    """Between which values the colours are spread; from 0 where all are alike."""
    least, largest = float(np.nanmin(values)), float(np.nanmax(values))
    if from_zero or largest - least < 1e-9:
        least = 0.0
    return least, largest if largest > least else 1.0


def _edges(steps: list[int]) -> list[float]:
    """Where each column begins and the last one ends, as wide as the middle one of the others."""
    width = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    return [*steps, steps[-1] + width]


def _active(row: Row, first: Row) -> float:
    return row["active_neurons"] / row["neurons"]


def _fan_in(row: Row, first: Row) -> float | None:
    if row["fan_in_mean"] is None or first["fan_in_mean"] is None:
        return None
    return row["fan_in_mean"] / first["fan_in_mean"]


def _sum(rows: list[Row], key: str) -> float:
    return sum(row[key] for row in rows)


def _numbers(row: Row, first: Row) -> str:
    means = (first["fan_in_mean"], row["fan_in_mean"])
    return " → ".join("—" if mean is None else f"{mean:.4g}" for mean in means)


def _percent(value: float | None) -> str:
    return "—" if value is None else f"{value:.1%}"


_QUANTITIES = (
    _Quantity(
        "Active neurons",
        _active,
        lambda row, first: f"{row['active_neurons']:,} / {row['neurons']:,}",
        lambda last: (
            f"share of each weight's neurons; of all: {_sum(last, 'active_neurons') / _sum(last, 'neurons'):.2%}"
        ),
        "viridis",
    ),
    _Quantity(
        "Fan-in",
        _fan_in,
        _numbers,
        lambda last: "mean fan-in of the active neurons, relative to the start; at the right first → last",
        "cividis",
    ),
    _Quantity(
        "Churn",
        lambda row, first: row["churn"],
        lambda row, first: _percent(row["churn"]),
        lambda last: "share of the active entries that an update grew; at the right that of the last one",
        "magma",
        from_zero=True,
    ),
    _Quantity(
        "ITOP rate",
        lambda row, first: row["itop"],
        lambda row, first: _percent(row["itop"]),
        lambda last: (
            f"share of the entries that were ever active since step {last[0]['itop_since']}"
            f"; of all: {_visited(last):.2%}"
        ),
        "viridis",
        from_zero=True,
    ),
)


def _visited(last: list[Row]) -> float:
    known = [row for row in last if row["itop"] is not None]
    return sum(row["itop"] * row["numel"] for row in known) / sum(row["numel"] for row in known)
