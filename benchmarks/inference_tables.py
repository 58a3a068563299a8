"""What benchmarks.inference prints and draws from its finished cells."""

from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from benchmarks.cells import Cell
from benchmarks.rivals import TORCH

OTHERS = ("MKL CSR", "ONNX Runtime", "DeepSparse")


def tables(cells: Sequence[Cell]) -> str:
    """Times and ratios, then what our artefact is, as GitHub's markdown."""
    times = tabulate(
        [time_row(cell) for cell in cells], headers="keys", tablefmt="github", disable_numparse=True
    )
    holds = tabulate([artefact_row(cell) for cell in cells], headers="keys", tablefmt="github")
    return (
        "Least milliseconds of a call; how many times faster ours is by least times (by the median over turns)\n\n"
        f"{times}\n\nOur artefact: FLOPs of nonzeros in sparse kernels, weights by kernel, cost\n\n{holds}"
    )


def time_row(cell: Cell) -> dict[str, str]:
    """One line of the table of times; of "compiled" is ours compiled against the model compiled."""
    us = cell.result["us"]
    line = named(cell) | {"rounds": str(cell.result["rounds"])}
    line |= {name: f"{us[name][0] / 1e3:.3g}" if name in us else "-" for name in (*TORCH, *OTHERS)}
    return line | {
        f"of {name}": ratio(cell, name) for name in ("eager", "compiled", "compiled, both", *OTHERS)
    }


def artefact_row(cell: Cell) -> dict[str, str]:
    """One line of the table of what we made."""
    result = cell.result
    share, peak = result["share"], result["peak_bytes"]
    return named(cell) | {
        "in sparse kernels": "-" if share is None else f"{share:.0%}",
        "kernels": ", ".join(f"{count} {kernel}" for kernel, count in result["kernels"].items()),
        "weights (MB)": f"{result['bytes']['sparse'] / 1e6:.1f} of {result['bytes']['dense'] / 1e6:.1f}",
        "peak of a call (MB)": f"{peak['ours'] / 1e6:.1f}, eager {peak['eager'] / 1e6:.1f}",
        "compile (s)": f"{result['seconds']['ours']:.1f}",
        "largest error": f"{result['errors']['ours']:.0e}",
    }


def named(cell: Cell) -> dict[str, str]:
    """The columns that every table begins with."""
    settings = cell.settings
    return {
        "model": settings["model"],
        "zeros": f"{settings['sparsity']:.0%}",
        "batch": str(settings["batch"]),
        "threads": str(settings["threads"]),
    }


def ratio(cell: Cell, rival: str) -> str:
    """How many times faster ours is than `rival`: by least times, and by the median over turns."""
    if rival not in cell.result["ratios"]:
        return "-"
    return f"{least_ratio(cell, rival):.2f}x ({cell.result['ratios'][rival]:.2f}x)"


def least_ratio(cell: Cell, rival: str) -> float:
    """Of the least times; "compiled, both" is compiled dense to compiled ours."""
    us = cell.result["us"]
    of, to = ("compiled", "ours compiled") if rival == "compiled, both" else (rival, "ours")
    return us[of][0] / us[to][0]


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Bars of our speed-up over each rival at batch 1 on one thread: a panel a model, a group of bars a sparsity."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [c for c in cells if (c.settings["batch"], c.settings["threads"]) == (1, 1)]
    models = list(dict.fromkeys(cell.settings["model"] for cell in shown))
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    rivals = ("eager", "compiled", *OTHERS)
    for axes, model in zip(figure.subplots(rows, columns, squeeze=False).flat, models, strict=False):
        of_model = sorted(
            (c for c in shown if c.settings["model"] == model), key=lambda c: c.settings["sparsity"]
        )
        for place, rival in enumerate(rivals):
            found = [
                (i, least_ratio(c, rival)) for i, c in enumerate(of_model) if rival in c.result["ratios"]
            ]
            places, ratios = [i + 0.16 * (place - 2) for i, _ in found], [r for _, r in found]
            axes.bar(places, ratios, 0.16, label=rival, color=f"C{place}")
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_xticks(range(len(of_model)), [f"{c.settings['sparsity']:.0%}" for c in of_model])
        axes.set_title(model, fontsize=9)
    handles = [Patch(color=f"C{place}", label=rival) for place, rival in enumerate(rivals)]
    figure.axes[0].legend(handles=handles, fontsize=6)
    figure.supylabel("rival's time / ours")
    figure.supxlabel("zeros")
    figure.savefig(path, dpi=110)
