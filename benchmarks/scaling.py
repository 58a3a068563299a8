"""Cost of training against width at a fixed number of nonzeros for each neuron: GSE, RigL in masked storage, dense.

``python -m benchmarks.scaling --figure docs/scaling.png``: three square layers ("mlp") and a transformer block ("vit",
whose hidden layer is four times as wide), 2,048 to 65,536 wide, 99 % zeros at 4,096, Adam.  Every cell has a process of
its own, so that peak memory is its own, and keeps what it frees.  Prints a table, and the exponents of
cost ~ width ** exponent.  Dense and masked weights stop at 8,192 (three layers of it need 3 and 5 GB with gradients
and Adam's moments).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.cells import Cell, environments, parser, run_cells

WIDTHS = (2048, 4096, 8192, 16384, 32768, 65536)
DENSE_LIMIT = {"mlp": 8192, "vit": 4096}
"""Widest model whose dense weights are trained here."""
METHODS = ("gse", "rigl", "dense")
L2, L3 = 2**20, 2**25
"""Bytes of the caches that the figure marks: L2 of one core, L3 of all."""
KEEP_FREED = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=67108864"
"""The C library hands blocks of 32 MiB and more back to the system when they are freed, and their next pages come
zeroed, one fault each: without this, a step of three layers 65,536 wide took 480 ms in place of about 300."""
COSTS: Mapping[str, tuple[str, float | None, Callable[[Any], float | None]]] = {
    "FLOPs of a step": ("GFLOP", 1.02, lambda r: r["step_counts"]["flops"] / 1e9),
    "FLOPs of an update step": ("GFLOP", 1.02, lambda r: _at(r, "update_counts", "flops", 1e9)),
    "bytes allocated in a step": ("MB", 1.02, lambda r: r["step_counts"]["bytes"] / 1e6),
    "bytes allocated in an update step": ("MB", 1.02, lambda r: _at(r, "update_counts", "bytes", 1e6)),
    "peak memory": ("MB", 1.1, lambda r: r["peak_bytes"] / 1e6),
    "time of a step": ("ms", 1.25, lambda r: r["step"]["least"] * 1e3),
    "time of an update step": ("ms", 1.25, lambda r: _at(r, "update", "least", 1e-3)),
    "CPU time of a step": ("ms", 1.25, lambda r: r["step"]["cpu"] * 1e3),
    "CPU time of an update step": ("ms", 1.25, lambda r: _at(r, "update", "cpu", 1e-3)),
}
"""{cost: (unit, largest exponent that GSE may have, read from a cell's result)}; times are the least of all steps."""


def main() -> None:
    """Read the options, measure what is missing, print and draw."""
    options = parser(__doc__, "benchmarks/results/scaling.json")
    options.add_argument("--figure", type=Path, metavar="FILE", help="draw cost against width")
    options.add_argument("--models", nargs="+", default=["mlp", "vit"], choices=("mlp", "vit"))
    words = options.parse_args()
    widths = WIDTHS[:2] if words.quick else WIDTHS
    cells = run_cells(list(grid(words.models, widths, words.threads)), in_own_process, words.output, 30)
    print(f"\n{environments(cells)}\n\n{table(cells)}\n\n{exponent_table(cells)}")
    if words.figure:
        draw(cells, words.figure)


def grid(models: Sequence[str], widths: Sequence[int], threads: int) -> Iterator[dict[str, Any]]:
    """The cells, narrow ones first; dense weights up to their limit."""
    for width in widths:
        for model in models:
            for method in METHODS:
                if method == "gse" or width <= DENSE_LIMIT[model]:
                    yield {
                        "model": model,
                        "method": method,
                        "width": width,
                        "tokens": 128,
                        "threads": threads,
                    }


def in_own_process(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What benchmarks.footprint measures.

    Raises:
        RuntimeError: its process failed; the message ends with what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.footprint", json.dumps(settings)]
    kept = os.environ | {"GLIBC_TUNABLES": KEEP_FREED}
    done = subprocess.run(command, capture_output=True, text=True, env=kept)
    if done.returncode:
        raise RuntimeError(f"{settings}: status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def series(
    cells: Sequence[Cell], read: Callable[[Any], float | None]
) -> dict[tuple[str, str], dict[int, float]]:
    """{(model, method): {width: cost}} of the cells that have this cost."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for cell in cells:
        cost = read(cell.result)
        if cost is not None:
            key = (cell.settings["model"], cell.settings["method"])
            found.setdefault(key, {})[cell.settings["width"]] = cost
    return found


def exponent(costs: Mapping[int, float]) -> float:
    """Slope of log cost against log width, by least squares over at least two widths."""
    return float(np.polyfit(np.log(list(costs)), np.log(list(costs.values())), 1)[0])


def table(cells: Sequence[Cell]) -> str:
    """One row for each cell."""
    headers = [f"{cost} ({unit})" for cost, (unit, _, _) in COSTS.items() if "CPU" not in cost]
    rows = []
    for cell in sorted(cells, key=lambda c: (c.settings["model"], METHODS.index(c.settings["method"]))):
        costs = [read(cell.result) for cost, (_, _, read) in COSTS.items() if "CPU" not in cost]
        names = [cell.settings[name] for name in ("model", "method", "width")]
        rows.append([*names, *("" if cost is None else f"{cost:.3g}" for cost in costs)])
    return tabulate(rows, ["model", "method", "width", *headers], tablefmt="github", disable_numparse=True)


def exponent_table(cells: Sequence[Cell]) -> str:
    """The exponents of each cost, and the largest that GSE may have."""
    columns = [(model, method) for model in ("mlp", "vit") for method in METHODS]
    rows = []
    for cost, (_, limit, read) in COSTS.items():
        found = series(cells, read)
        fitted = [found.get(column, {}) for column in columns]
        rows.append([cost, limit, *(f"{exponent(each):.3f}" if len(each) > 1 else "" for each in fitted)])
    headers = ["cost ~ width ** ...", "target", *(f"{model} {method}" for model, method in columns)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Each cost against width on logarithmic axes, with its exponent; dotted: activations outgrow a cache."""
    from matplotlib.figure import Figure

    shown = [cost for cost in COSTS if "CPU" not in cost]
    figure = Figure(figsize=(15, 7))
    panels = figure.subplots(2, 4).flat
    for panel, cost in zip(panels, shown, strict=False):
        unit, _, read = COSTS[cost]
        for (model, method), costs in sorted(series(cells, read).items()):
            style = "-" if model == "mlp" else "--"
            label = f"{model} {method}: {exponent(costs):.2f}" if len(costs) > 1 else f"{model} {method}"
            color = f"C{METHODS.index(method)}"
            panel.plot(
                list(costs), list(costs.values()), style, marker="o", ms=3, lw=1.2, color=color, label=label
            )
        for bytes_, name in ((L2, "L2"), (L3, "L3")):
            panel.axvline(bytes_ / (4 * 128), color="gray", lw=0.8, ls=":")  # 128 tokens of fp32
            panel.text(bytes_ / (4 * 128), panel.get_ylim()[0], name, fontsize=7, color="gray")
        panel.set(title=cost, ylabel=unit, xlabel="width", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, title="exponent", title_fontsize=7)
    for panel in list(figure.axes)[len(shown) :]:
        panel.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def _at(result: Mapping[str, Any], part: str, name: str, unit: float) -> float | None:
    """``result[part][name]`` in `unit`, None where the method has no updates."""
    return result[part][name] / unit if part in result else None


if __name__ == "__main__":
    main()
