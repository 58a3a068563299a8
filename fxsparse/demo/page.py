"""The demo's HTML page: the tables, the plots, and every report."""

import io
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fxsparse import topology
from fxsparse.demo.outcome import Outcome, Table, tables
from fxsparse.errors import UnsupportedError
from fxsparse.report import embedded

RUNS = {"dense": "tab:gray", "masked": "tab:blue", "compact": "tab:green"}


def write_page(outcomes: list[Outcome], path: Path) -> None:
    """Write one self-contained page to `path`.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    source = resources.files("fxsparse").joinpath("report.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True).from_string(source)
    pages = [*tables(outcomes), *_reports(outcomes)]
    path.write_text(template.render(tables=pages, plots=embedded(draw(outcomes))), encoding="utf-8")


def draw(outcomes: list[Outcome]) -> dict[str, bytes]:
    """{title: PNG or SVG}: accuracies, latencies, density and largest mask of each model, and how its masks moved."""
    return {
        "Test accuracy": _accuracy(outcomes),
        "Latency": _latency(outcomes),
        "Density of each weight": _density(outcomes),
        "The largest mask of each model": _masks(outcomes),
        **_moves(outcomes),
    }


def _moves(outcomes: list[Outcome]) -> dict[str, bytes]:
    """Of the compact run alone: that in masked storage makes the same choices."""
    return {
        f"{outcome.name}: {title}": svg
        for outcome in outcomes
        for title, svg in topology.draw(outcome.reports["compact"].topology.rows()).items()
    }


def _reports(outcomes: list[Outcome]) -> list[Table]:
    """Tables of every report, their titles saying which."""
    return [
        (f"{name}: {title}", headers, rows)
        for outcome in outcomes
        for name, report in outcome.named_reports().items()
        for title, headers, rows in report.tables()
    ]


def _figure(columns: int, height: float = 3.2) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"plots need matplotlib, and {error.name!r} is not installed: pip install 'fxsparse[demo]'"
        ) from error
    figure = Figure(figsize=(4.5 * columns, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _accuracy(outcomes: list[Outcome]) -> bytes:
    figure, (axes,) = _figure(1)
    for shift, (run, colour) in enumerate(RUNS.items()):
        heights = [outcome.accuracy[run] for outcome in outcomes]
        bars = axes.bar(
            [x + 0.27 * shift for x in range(len(outcomes))], heights, 0.25, label=run, color=colour
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks([x + 0.27 for x in range(len(outcomes))], [outcome.name for outcome in outcomes])
    axes.set_ylim(min(min(o.accuracy.values()) for o in outcomes) - 5, 101)
    axes.set_ylabel("test accuracy (%)")
    axes.legend(ncols=3, fontsize=7, loc="lower center")
    return _png(figure)


def _latency(outcomes: list[Outcome]) -> bytes:
    batches = [timed.batch for timed in outcomes[0].latencies]
    figure, panels = _figure(len(batches))
    for index, (axes, batch) in enumerate(zip(panels, batches, strict=True)):
        timed = [outcome.latencies[index] for outcome in outcomes]
        places = range(len(timed))
        axes.bar(places, [t.dense_us for t in timed], 0.38, label="dense", color=RUNS["dense"])
        bars = axes.bar(
            [x + 0.4 for x in places],
            [t.sparse_us for t in timed],
            0.38,
            label="sparse",
            color=RUNS["compact"],
        )
        axes.bar_label(bars, [f"{t.speedup:.1f}x" for t in timed], fontsize=8)
        axes.set_xticks([x + 0.2 for x in places], [outcome.name for outcome in outcomes])
        axes.set_title(f"batch {batch}")
        axes.set_ylabel("median (us)")
        axes.legend(fontsize=7)
    return _png(figure)


def _density(outcomes: list[Outcome]) -> bytes:
    figure, panels = _figure(len(outcomes), height=4)
    for axes, outcome in zip(panels, outcomes, strict=True):
        names = list(outcome.masks)[::-1]
        axes.barh(names, [outcome.masks[name].float().mean().item() for name in names], color=RUNS["compact"])
        axes.tick_params(axis="y", labelsize=6)
        axes.set_title(outcome.name)
        axes.set_xlabel("density (nonzeros / entries)")
    return _png(figure)


def _masks(outcomes: list[Outcome]) -> bytes:
    figure, panels = _figure(len(outcomes), height=4)
    for axes, outcome in zip(panels, outcomes, strict=True):
        name, mask = max(outcome.masks.items(), key=lambda item: item[1].numel())
        axes.imshow(mask.flatten(1).cpu().numpy(), cmap="binary", aspect="auto", interpolation="antialiased")
        axes.set_title(f"{outcome.name}: {name}", fontsize=8)
        axes.set_xlabel("input")
        axes.set_ylabel("output")
    return _png(figure)
