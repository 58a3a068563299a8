"""SRigL's layer benchmark (arXiv:2305.02299, section 4.3), rebuilt: one ViT layer, 3,072 to 768, on the CPU.

    python -m benchmarks.srigl_layer [--quick] [--deepsparse PYTHON] [-o FILE] [--figure FILE]

The paper's layer at 90 % has 318 active rows of fan-in 741; the active rows at 80, 95 and 99 % are not published and
are estimates here, with the published numbers of nonzeros.  At 90 % there is the same layer without ablation, too.
Methods take turns; a turn is up to 20 calls in a row, about a millisecond; at batch 1 every method makes at least
10,000 calls.  "alone" is the median of single calls in turns, which find their weight in L3 or in memory.  Every method
is first compared with the masked dense product in fp64.  "ours" is the faster of the lookup and the condensed kernel,
as the chooser would take, with the 768 outputs in place; "no scatter" returns the active rows alone, as structured and
gather do.
"""

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import layer_methods
from benchmarks.cells import Cell, Settings, environments, parser, run_cells
from benchmarks.engines import DeepSparse
from fxsparse.timing import interleaved_samples

LAYERS = ((90, 318, 741), (90, 768, 307), (80, 280, 1685), (95, 300, 393), (99, 590, 39))
"""(sparsity in %, active rows, fan-in)."""
ESTIMATES = (280, 300, 590)
"""Active rows that are interpolated from the paper's timings of structured layers."""
BATCHES = tuple(2**n for n in range(12))
OURS = ("lookup", "condensed")
_SECONDS = 4.0
_TURNS = (9, 201)


def main() -> None:
    """Run what is missing, then print the tables and draw the figure."""
    command = parser(__doc__, output="benchmarks/results/srigl_layer.json")
    python = os.environ.get("FXSPARSE_DEEPSPARSE_PYTHON")
    command.add_argument(
        "--deepsparse", metavar="PYTHON", default=python, help="a Python with deepsparse 1.8"
    )
    command.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw time against batch (needs matplotlib)"
    )
    options = command.parse_args()
    wanted = grid(options.quick, options.deepsparse is not None)
    cells = run_cells(wanted, lambda cell: measure(cell, options.deepsparse), options.output, seconds=20)
    print(environments(cells))
    print(tabulate([row(cell) for cell in cells], headers="keys", disable_numparse=True, missingval="-"))
    if options.deepsparse is None:
        print("DeepSparse: not measured, since no Python that has it was given (--deepsparse)")
    alone = [
        {"cell": name, **ratios}
        for cell in cells
        if "alone" in cell.result
        for name, ratios in [alone_row(cell)]
    ]
    print("\nSingle calls in turns: ours (us), and how many times faster it is than the best dense, ...")
    print(tabulate(alone, headers="keys", floatfmt=".2f"))
    print("\n".join(crossovers(cells)))
    if options.figure:
        draw(cells, options.figure)


def grid(quick: bool, deepsparse: bool) -> list[dict[str, Any]]:
    """The cells; those that matter most come first."""
    layers, batches = (LAYERS[:2], (1, 8)) if quick else (LAYERS, BATCHES)
    cells = [
        {
            "sparsity": sparsity,
            "rows": rows,
            "fan_in": fan_in,
            "dtype": dtype,
            "threads": threads,
            "batch": batch,
        }
        for threads in (1, 2)
        for dtype in ("float32", "bfloat16")
        for group in (layers[:2], layers[2:])
        for batch in batches
        for sparsity, rows, fan_in in group
    ]
    return [{**cell, "calls": _calls(cell["batch"], quick), "deepsparse": deepsparse} for cell in cells]


def measure(settings: Settings, python: str | None = None) -> dict[str, Any]:
    """{"us": {method: [least, lower quartile, median, upper quartile]}}, and at batch 1 "alone", the same."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    dtype = getattr(torch, settings["dtype"])
    weight, bias = layer_methods.layer(settings["rows"], settings["fan_in"], dtype)
    x = torch.randn(settings["batch"], weight.shape[1], dtype=dtype)
    torch._dynamo.reset()
    calls = layer_methods.calls(x, weight, bias)
    python = python if dtype == torch.float32 else None
    with torch.no_grad(), layer_methods.deepsparse(python, x, weight, bias, settings["threads"]) as engine:
        if engine is not None:
            layer_methods.check("DeepSparse", engine.output, x, weight, bias)
        for name, call in calls.items():
            layer_methods.check(name, call(), x, weight, bias)
        return _times(calls, engine, settings["calls"])


def _calls(batch: int, quick: bool) -> int:
    """The least number of calls of every method; 0 where the time for a cell decides."""
    return (500 if quick else 10_000) if batch == 1 else 0


def _times(calls: dict[str, Any], engine: DeepSparse | None, least: int) -> dict[str, Any]:
    # Warm calls where turns are of warm calls: a first call takes several times as long as a small weight does.
    tried = dict.fromkeys([*calls, "DeepSparse"], 10 if least else 1)
    single = {name: min(s) for name, s in _samples(calls, engine, 5, tried).items()}
    # Turns of like length, so that none is interrupted more often than the others where the machine is shared.
    inner = {name: max(5 if least else 1, min(20, int(1000 / us))) for name, us in single.items()}
    fitting = _SECONDS * 1e6 / sum(single[name] * inner[name] for name in single)
    turns = math.ceil(least / min(inner.values())) if least else int(max(_TURNS[0], min(_TURNS[1], fitting)))
    samples = _samples(calls, engine, turns, inner)
    result: dict[str, Any] = {"us": {name: _spread(values) for name, values in samples.items()}}
    if least:
        alone = _samples(calls, engine, max(25, least // 50), dict.fromkeys(inner, 1))
        result["alone"] = {name: _spread(values) for name, values in alone.items()}
    return result


def _samples(
    calls: dict[str, Any], engine: DeepSparse | None, turns: int, inner: dict[str, int]
) -> dict[str, list[float]]:
    if engine is None:
        return interleaved_samples(calls, rounds=turns, warm_up=1, inner=inner)
    theirs: list[float] = []
    # Its own clock counts, so that the pipe between the processes does not.
    runs = inner.get("DeepSparse", 1)
    calls = {**calls, "DeepSparse": lambda: theirs.append(engine.microseconds(runs))}
    ours = interleaved_samples(calls, rounds=turns, warm_up=1, inner={**inner, "DeepSparse": 1})
    return {**ours, "DeepSparse": theirs[1:]}


def _spread(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in (min(values), *statistics.quantiles(values, n=4))]


def medians(cell: Cell, times: str = "us") -> dict[str, float]:
    """{method: median microseconds}, with "ours" and "ours, no scatter"; `times` may be "alone"."""
    return with_ours({name: spread[2] for name, spread in cell.result[times].items()})


def with_ours(times: dict[str, float]) -> dict[str, float]:
    """`times` and the faster of our kernels, with and without scatter."""
    ours = {"ours": min(times[name] for name in OURS)}
    return times | ours | {"ours, no scatter": min(times[f"{name}, no scatter"] for name in OURS)}


def row(cell: Cell) -> dict[str, str]:
    """One line of the table: microseconds, and how many times faster ours is than each rival."""
    settings, times = cell.settings, medians(cell)
    mark = "~" if settings["rows"] in ESTIMATES else ""
    line = {
        "zeros %": str(settings["sparsity"]),
        "rows x fan-in": f"{mark}{settings['rows']} x {settings['fan_in']}",
        "dtype": settings["dtype"],
        "threads": str(settings["threads"]),
        "batch": str(settings["batch"]),
    }
    line |= {name: f"{times[name]:.1f}" for name in times if name not in OURS and ", no" not in name}
    line["no scatter"] = f"{times['ours, no scatter']:.1f}"
    return line | {f"of {name}": f"{ratio:.2f}x" for name, ratio in ratios(times).items()}


def alone_row(cell: Cell) -> tuple[str, dict[str, float]]:
    """The layer, and the times of single calls: ours, and how many times faster it is than each rival."""
    settings, times = cell.settings, medians(cell, "alone")
    name = f"{settings['rows']} x {settings['fan_in']}, {settings['dtype']}, {settings['threads']} thread(s)"
    return name, {"ours": times["ours"], **ratios(times)}


def ratios(times: dict[str, float]) -> dict[str, float]:
    """How many times faster ours (with the outputs in place) is than the best dense, structured and CSR."""
    rivals = {"dense": ("dense", "dense compiled"), "structured": ("structured", "structured compiled")}
    rivals |= {
        "CSR": ("CSR", "structured CSR"),
        "gather": ("gather compiled",),
        "DeepSparse": ("DeepSparse",),
    }
    best = {
        name: [times[method] for method in methods if method in times] for name, methods in rivals.items()
    }
    return {name: min(found) / times["ours"] for name, found in best.items() if found}


def crossovers(cells: Sequence[Cell]) -> list[str]:
    """For each series over the batch, where ours first loses to dense or to the structured product."""
    lines = []
    for (sparsity, rows, fan_in, dtype, threads), found in series(cells).items():
        what = f"{sparsity} %, {rows} x {fan_in}, {dtype}, {threads} thread(s)"
        for rival in ("dense", "structured"):
            lost = [batch for batch, times in found.items() if ratios(times)[rival] < 1]
            where = (
                f"slower than {rival} at batch {', '.join(map(str, lost))}"
                if lost
                else f"never slower than {rival}"
            )
            lines.append(f"{what}: ours is {where} (batches {min(found)} to {max(found)})")
    return lines


def series(cells: Sequence[Cell]) -> dict[tuple, dict[int, dict[str, float]]]:
    """{(sparsity, rows, fan-in, dtype, threads): {batch: medians}}."""
    found: dict[tuple, dict[int, dict[str, float]]] = {}
    for cell in cells:
        key = tuple(cell.settings[name] for name in ("sparsity", "rows", "fan_in", "dtype", "threads"))
        found.setdefault(key, {})[cell.settings["batch"]] = medians(cell)
    return found


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Time of one call against the batch, a panel for each fp32 layer on one thread."""
    import matplotlib.pyplot as plt

    found = {key: value for key, value in series(cells).items() if key[3:] == ("float32", 1)}
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 4), sharey=True, squeeze=False)
    names = ("dense", "structured", "CSR", "gather compiled", "DeepSparse", "ours")
    for panel, ((sparsity, rows, fan_in, *_), times) in zip(axes[0], found.items(), strict=True):
        batches = sorted(times)
        for name in names:
            points = [(batch, times[batch][name]) for batch in batches if name in times[batch]]
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    lw=2 if name == "ours" else 1,
                    label=name,
                )
        estimate = " (estimate)" if rows in ESTIMATES else ""
        panel.set(title=f"{sparsity} % zeros\n{rows} rows{estimate} of fan-in {fan_in}", xlabel="batch")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("one call, microseconds")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("Linear 3,072 to 768 on the CPU, fp32, one thread: median time of a call")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
