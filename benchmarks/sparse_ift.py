"""Sparse-IFT's four transformations against the dense model, static masks against RigL, at equal FLOPs and recipe.

    python -m benchmarks.sparse_ift --figure docs/sparse_ift.png
    python -m benchmarks.sparse_ift --spectra CNN         # gaps of RigL's masks before and after training, one seed

As in the paper no hyper-parameter of the dense model is changed: steps, batches, AdamW and its rate, which is the one
that was chosen for the dense model.  Masks are uniform over layers; RigL exchanges 0.3 of the entries every five steps,
falling to 0 at step 60 of 100 (100 of 150 for the language model).  The sparsity is solved so that the transformed
layers cost what they did; what lies outside of them (attention, stem, head) may cost more.  Scores are those after the
last step.  To fit an hour the ViT is half as wide as the demo's, and the language model reads 8 windows a step, not 32.
"""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.cells import Cell, Settings, environment, environments, parser, read_cells, run_cells
from benchmarks.tasks import bytes as byte_text
from benchmarks.tasks import digits
from benchmarks.tasks.comparison import DENSE, Task, paired, run, settings_of
from fxsparse import SparseModule
from fxsparse.analysis import SpectralHistory, spectral_layers
from fxsparse.analysis.layers import QUANTITIES, mean_of
from fxsparse.demo.models import ViT, cnn
from fxsparse.report import cell

TRANSFORMS = ("sparse-wide", "sparse-parallel", "sparse-factorized", "sparse-doped")
STATIC, RIGL = "static", "rigl"
OPTIONS = {STATIC: "score=random", RIGL: "every=5,drop_fraction=0.3,decay=cosine,variant=torch"}
WINDOWS = 8
COLOURS: dict[str, str] = dict(
    zip(TRANSFORMS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True)
)


@dataclass(frozen=True)
class Experiment:
    """One model and its part of the grid."""

    task: Task
    model: str
    sparsities: tuple[float, ...]
    steps: int
    seeds: int
    seconds: float
    """Rough time of a cell on one core."""
    places: int
    """Digits of a score after the point."""
    lower_is_better: bool = False


def _few_windows(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A quarter of the batch that the byte model has elsewhere."""
    inputs, labels = byte_text.draw(generator)
    return inputs[:WINDOWS], labels[:WINDOWS]


def _at_dense_rate(task: Task, **changes: Any) -> Task:
    return replace(task, rates=(task.rates[0], task.rates[0]), **changes)


DIGITS = _at_dense_rate(
    digits.TASK,
    models={"CNN": cnn, "ViT": functools.partial(ViT, width=128)},
    identity=lambda: {"rate": "dense"},
)
BYTES = _at_dense_rate(
    byte_text.TASK,
    draw=_few_windows,
    identity=lambda: byte_text.identity() | {"windows": WINDOWS, "rate": "dense"},
)
EXPERIMENTS = {
    "CNN": Experiment(DIGITS, "CNN", (0.5, 0.75, 0.9), 100, 5, 4, 2),
    "ViT": Experiment(DIGITS, "ViT", (0.5, 0.75, 0.9), 100, 5, 5, 2),
    "bytes": Experiment(BYTES, "transformer", (0.75,), 150, 3, 18, 3, True),
}


def main() -> None:
    """Run the grid, print the table, and draw the figure."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.spectra:
        print(f"{environment()}\n{spectra(EXPERIMENTS[options.spectra])}")
        return
    grid = grid_of([EXPERIMENTS[name] for name in options.experiments], options.quick)
    if options.finished:
        cells = [cell for cell in read_cells(options.output) if cell.settings in grid]
        print(f"{len(cells)} of {len(grid)} cells are finished")
    else:
        cells = run_cells(grid, measure, options.output, seconds=lambda s: experiment_of(s).seconds)
    print(f"\n{environments(cells)}\n{table(cells)}")
    if options.figure:
        draw(cells, options.figure)


def grid_of(experiments: Sequence[Experiment], quick: bool = False) -> list[Settings]:
    """Dense and every transformation with both methods, seed by seed, so that a stopped run leaves whole seeds."""
    return [
        settings_of(of.task, of.model, method, sparsity, 40 if quick else of.steps, seed)
        for seed in range(1 if quick else max(of.seeds for of in experiments))
        for of in experiments
        if seed < of.seeds
        for sparsity, method in rows_of(of)
    ]


def rows_of(of: Experiment) -> list[tuple[float, str]]:
    """(sparsity, method) of its rows."""
    sparse = [(s, method_of(name, t)) for s in of.sparsities for t in TRANSFORMS for name in OPTIONS]
    return [(0.0, DENSE), *sparse]


def method_of(name: str, transform: str) -> str:
    """A method of `comparison`, with everything that a cell depends on."""
    return f"{name}:{OPTIONS[name]},transform={transform},allocation=uniform,storage=compact"


def measure(settings: Settings) -> dict[str, Any]:
    """Score and milliseconds a step; of a sparse run also its FLOPs over the dense ones, and how its masks mix."""
    found: dict[str, Any] = {}

    def watch(model: nn.Module, _: object) -> None:
        if isinstance(model, SparseModule):
            totals = model.report.totals
            found.update({key: totals[key] for key in ("layers_ratio", "model_ratio", "sparsity")})

    model, result = run(experiment_of(settings).task, settings, watch)
    if isinstance(model, SparseModule):
        of_layers = spectral_layers(model).values()
        found["ramanujan_gap"] = mean_of(of_layers, "ramanujan_gap")
        found["full_spectrum_distance"] = mean_of(of_layers, "full_spectrum_distance")
    return result | found


def experiment_of(settings: Settings) -> Experiment:
    """The part of the grid that a cell is of."""
    return next(one for one in EXPERIMENTS.values() if one.model == settings["model"])


def table(cells: Sequence[Cell]) -> str:
    """Scores with paired differences to dense and of RigL to static, FLOPs and gaps, in GitHub's markdown."""
    rows = []
    for of in EXPERIMENTS.values():
        dense = _row(cells, of.model, 0.0, DENSE)
        if dense:
            rows.append([of.model, "0%", DENSE, "", *_scores(of, dense), *[""] * 3, "1.00 / 1.00", ""])
        for sparsity in of.sparsities:
            for transform in TRANSFORMS:
                found = {m: _row(cells, of.model, sparsity, method_of(m, transform)) for m in OPTIONS}
                for name in (name for name in OPTIONS if found[name]):
                    against = _against(of, found[RIGL], found[STATIC])[0] if name == RIGL else ""
                    rows.append(
                        [
                            of.model,
                            f"{sparsity:.0%}",
                            transform,
                            name,
                            *_scores(of, found[name]),
                            *_against(of, found[name], dense),
                            against,
                            _flops(found[name]),
                            _mean(found[name], "ramanujan_gap"),
                        ]
                    )
    headers = [
        "model",
        "zeros",
        "transformation",
        "masks",
        "seeds",
        "score",
        "deviation",
        "difference to dense",
    ]
    headers += ["beyond 2 errors", "RigL - static", "FLOPs of layers / model", "Ramanujan gap"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def spectra(of: Experiment, steps: int | None = None) -> str:
    """Means over the weights of every spectral quantity, at the random start and after training with RigL, seed 0."""
    rows = []
    for sparsity in of.sparsities:
        for transform in TRANSFORMS:
            settings = settings_of(
                of.task, of.model, method_of(RIGL, transform), sparsity, steps or of.steps, 0
            )
            history = SpectralHistory()
            model, _ = run(of.task, settings, lambda model, _, to=history: _record(to, model))
            _record(history, model)
            for step, means in history.means().items():
                rows.append([of.model, f"{sparsity:.0%}", transform, str(step), *map(cell, means.values())])
    headers = ["model", "zeros", "transformation", "step", *QUANTITIES.values()]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Mean score by sparsity with two standard errors; RigL filled, static hollow, the dense model as a line."""
    from matplotlib.figure import Figure

    shown = [of for of in EXPERIMENTS.values() if _row(cells, of.model, 0.0, DENSE)]
    figure = Figure(figsize=(4.2 * len(shown), 3.8), layout="constrained")
    for axes, of in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for index, (transform, name) in enumerate((t, m) for t in TRANSFORMS for m in OPTIONS):
            method = method_of(name, transform)
            rows = [(i, _row(cells, of.model, s, method)) for i, s in enumerate(of.sparsities)]
            rows = [(i + 0.08 * index - 0.28, [c.result["score"] for c in row]) for i, row in rows if row]
            errors = [2 * statistics.stdev(r) / len(r) ** 0.5 if len(r) > 1 else 0.0 for _, r in rows]
            axes.errorbar(
                [place for place, _ in rows],
                [statistics.mean(r) for _, r in rows],
                errors,
                fmt="o",
                markersize=4,
                capsize=2,
                linewidth=0.8,
                color=COLOURS[transform],
                markerfacecolor=COLOURS[transform] if name == RIGL else "white",
                label=f"{transform}, {name}",
            )
        level = statistics.mean(c.result["score"] for c in _row(cells, of.model, 0.0, DENSE))
        axes.axhline(level, color="gray", linewidth=0.8, label=DENSE)
        axes.set_xticks(range(len(of.sparsities)), [f"{sparsity:.0%}" for sparsity in of.sparsities])
        axes.set_xlabel("zeros")
        axes.set_ylabel(of.task.score)
        axes.set_title(f"{of.model}, {of.task.name}")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, ncols=5, loc="outside lower center")
    figure.savefig(path, dpi=110)


def _record(history: SpectralHistory, model: nn.Module) -> None:
    assert isinstance(model, SparseModule), "a transformed model is sparse"
    history.record(model)


def _row(cells: Sequence[Cell], model: str, sparsity: float, method: str) -> list[Cell]:
    row = (model, sparsity, method)
    return [c for c in cells if (c.settings["model"], c.settings["sparsity"], c.settings["method"]) == row]


def _scores(of: Experiment, row: Sequence[Cell]) -> tuple[str, str, str]:
    scores = [cell.result["score"] for cell in row]
    deviation = f"{statistics.stdev(scores):.{of.places}f}" if len(scores) > 1 else "-"
    return str(len(scores)), f"{statistics.mean(scores):.{of.places}f}", deviation


def _against(of: Experiment, row: Sequence[Cell], reference: Sequence[Cell]) -> tuple[str, str]:
    """Mean difference over the seeds that both have, with its standard error; and whether it exceeds two of them.

    An error of two seeds is too rough to judge by.
    """
    scores, others = ({c.settings["seed"]: c.result["score"] for c in cells} for cells in (row, reference))
    shared = [seed for seed in scores if seed in others]
    if len(shared) < 2:
        return "", ""
    found = paired([scores[seed] for seed in shared], [others[seed] for seed in shared])
    better = (found.mean < 0) == of.lower_is_better
    verdict = "" if found.equal or len(shared) < 3 else "better" if better else "**worse**"
    return f"{found.mean:+.{of.places}f} ± {found.error:.{of.places}f}", verdict


def _flops(row: Sequence[Cell]) -> str:
    return f"{row[0].result['layers_ratio']:.2f} / {row[0].result['model_ratio']:.2f}"


def _mean(row: Sequence[Cell], key: str) -> str:
    known = [cell.result[key] for cell in row if cell.result[key] is not None]
    return f"{statistics.mean(known):.2f}" if known else "—"


def _options() -> Any:
    made = parser(__doc__, output="benchmarks/results/sparse_ift.json", figure="the scores by sparsity")
    made.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    made.add_argument(
        "--spectra", choices=list(EXPERIMENTS), help="show how RigL moves the gaps, and run no grid"
    )
    return made.parse_args()


if __name__ == "__main__":
    main()
