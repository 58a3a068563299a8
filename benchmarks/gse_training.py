"""GSE against RigL, SET and static masks, on the digits and on a byte-level language model.

    python -m benchmarks.gse_training --figure docs/gse_training.png

Steps, seeds, initial weights (the model's own), learning rate, allocation (ER on the unrolled weight), drop fraction
(0.3, cosine), update period (20 steps) and what the optimizer does at an update are the same for all; none was tuned.
Linear layers train in compact storage; RigL in masked storage, one seed, shows what dense weights take.  Scores are
those after the last step.  Times are the processor's for this process, so that other programs hardly count.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.optim import AdamW

from benchmarks.cells import Cell, Settings, environments, parser, read_cells, run_cells
from benchmarks.tasks import bytes as byte_text
from benchmarks.tasks import digits
from benchmarks.tasks.comparison import DENSE, Task, paired, plan_of, run, scores, settings_of
from fxsparse.schedule import Schedule

SCHEDULE = "drop_fraction=0.3,decay=cosine,allocation=er_unrolled"
GSE = f"gse:{SCHEDULE},variant=torch,weight_init=keep,storage=compact"
RIGL = f"rigl:{SCHEDULE},variant=torch,storage=compact"
SET = f"set:{SCHEDULE},storage=compact"
STATIC = "static:allocation=er_unrolled,storage=compact"
RIGL_MASKED = f"rigl:{SCHEDULE},variant=torch,storage=masked"
GRABO, GRAEST = (f"gse:sampling={name},{GSE.removeprefix('gse:')}" for name in ("grabo", "graest"))
LABELS = {
    GSE: "GSE",
    GRABO: "GSE, GraBo",
    GRAEST: "GSE, GraEst",
    RIGL: "RigL",
    RIGL_MASKED: "RigL, masked",
    SET: "SET",
    STATIC: "static",
    DENSE: "dense",
}
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
EXTRA = 0.95  # where GraBo and GraEst are shown
TASKS = {"digits": digits.TASK, "bytes": byte_text.TASK}
MODELS = {"digits": ("MLP", "ViT"), "bytes": ("transformer",)}
ALL_MODELS = [model for models in MODELS.values() for model in models]
SEEDS = 5
DIGITS = {"digits": 2, "bytes": 3}  # after the point


def main() -> None:
    """Run the grid, print the table, and draw the figure."""
    options = _options()
    torch.set_num_threads(options.threads)
    grid = [s for name in options.tasks for s in grid_of(name, options.seeds, options.quick)]
    if options.finished:
        cells = [cell for cell in read_cells(options.output) if cell.settings in grid]
        print(f"{len(cells)} of {len(grid)} cells are finished")
    else:
        cells = run_cells(grid, measure, options.output, seconds=25)
    print(f"\n{environments(cells)}\n{table(cells)}")
    if options.figure:
        draw(cells, options.figure)


def grid_of(name: str, seeds: int, quick: bool = False) -> list[Settings]:
    """The cells of one task, by model; the main rows seed by seed, so that a stopped run leaves whole seeds."""
    rows = [(s, m) for s in SPARSITIES for m in (GSE, RIGL, SET, STATIC)] + [(0.0, DENSE)]
    extra = [(EXTRA, m) for m in (GRABO, GRAEST)]
    once = [(s, RIGL_MASKED) for s in SPARSITIES]
    if quick:
        rows, extra, once, seeds = [(EXTRA, m) for m in (GSE, RIGL)], [], [], 1
    task = TASKS[name]
    return [
        settings_of(task, model, method, sparsity, 60 if quick else task.steps, seed)
        for model in MODELS[name]
        for part, times in ((rows, seeds), (once, 1), (extra, seeds))
        for seed in range(times)
        for sparsity, method in part
    ]


def measure(settings: Settings) -> dict[str, Any]:
    """Score, processor milliseconds of a step without and with an update, and bytes (`Watch`)."""
    watch = Watch()
    _, result = run(TASKS[settings["task"]], settings, watch.attach)
    schedule = None if settings["method"] == DENSE else plan_of(settings).method.schedule
    return result | watch.found(schedule)


@dataclass
class Watch:
    """Times the steps of one training and counts its gradients."""

    seconds: list[float] = field(default_factory=list)
    """Processor time at the end of every step, and at the start."""
    gradient_bytes: int = 0
    """Of the last step."""

    def attach(self, model: nn.Module, optimizer: AdamW) -> None:
        """From here on."""
        self.seconds = [time.process_time()]

        def stepped(*_: object) -> None:
            self.seconds.append(time.process_time())
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.gradient_bytes = sum(g.numel() * g.element_size() for g in gradients)

        optimizer.register_step_post_hook(stepped)

    def found(self, schedule: Schedule | None) -> dict[str, Any]:
        """``processor_ms`` and ``update_ms``, medians over steps without and with an update; None: no such step."""
        # An update in the place of step t comes after t steps, one beside it follows the t-th.
        late = schedule is not None and schedule.skip_step
        updates = {step + late for step in schedule.updates(len(self.seconds))} if schedule else ()
        took = [1e3 * (end - start) for start, end in itertools.pairwise(self.seconds)]
        at_update = [ms for step, ms in enumerate(took, 1) if step in updates]
        others = [ms for step, ms in enumerate(took, 1) if step not in updates]
        return {
            "processor_ms": round(statistics.median(others), 3) if others else None,
            "update_ms": round(statistics.median(at_update), 3) if at_update else None,
            "gradient_bytes": self.gradient_bytes,
        }


def table(cells: Sequence[Cell]) -> str:
    """Scores with paired differences to RigL, processor time and memory, in GitHub's markdown."""
    by_row = scores(cells)
    rows = []
    for (model, sparsity, method), values in sorted(by_row.items(), key=_place):
        of_row = _of(cells, model, sparsity, method)
        task = TASKS[of_row[0].settings["task"]]
        deviation = f"{statistics.stdev(values):.{DIGITS[task.name]}f}" if len(values) > 1 else "-"
        rows.append(
            [
                model,
                f"{sparsity:.0%}",
                LABELS[method],
                str(len(values)),
                f"{statistics.mean(values):.{DIGITS[task.name]}f}",
                deviation,
                *against_rigl(task, values, by_row.get((model, sparsity, RIGL), []), method),
                f"{statistics.median(c.result['processor_ms'] for c in of_row):.1f}",
                _median([c.result["update_ms"] for c in of_row]),
                f"{held_bytes(of_row[0]) / 1e6:.2f}",
            ]
        )
    headers = [
        "model",
        "zeros",
        "method",
        "seeds",
        "score",
        "deviation",
        "difference to RigL",
        "beyond 2 errors",
    ]
    headers += ["step (ms)", "update step (ms)", "memory (MB)"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def against_rigl(task: Task, values: Sequence[float], rigl: Sequence[float], method: str) -> tuple[str, str]:
    """Mean difference over the seeds that both have, with its standard error; and whether it exceeds two of them.

    An error of fewer than five seeds is too rough to judge by, and the row says so.
    """
    shared = min(len(values), len(rigl))
    if method in (RIGL, RIGL_MASKED, DENSE) or shared < 2:
        return "", ""
    found = paired(values[:shared], rigl[:shared])
    places = DIGITS[task.name]
    better = found.mean < 0 if task is TASKS["bytes"] else found.mean > 0
    verdict = "" if found.equal else "better" if better else "**worse**"
    if shared < SEEDS:
        verdict = "few seeds"
    return f"{found.mean:+.{places}f} ± {found.error:.{places}f}", verdict


def held_bytes(cell: Cell) -> int:
    """Parameters, buffers, optimizer state and gradients."""
    return cell.result["state_bytes"] + cell.result["gradient_bytes"]


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Mean score against sparsity, by method, with two standard errors where all five seeds are there."""
    from matplotlib.figure import Figure

    by_row = scores(cells)
    models = list(dict.fromkeys(model for model, _, _ in by_row))
    figure = Figure(figsize=(3.6 * len(models), 3.4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for shift, method in enumerate((GSE, RIGL, SET, STATIC)):
            found = [i for i, sparsity in enumerate(SPARSITIES) if (model, sparsity, method) in by_row]
            rows = [by_row[model, SPARSITIES[i], method] for i in found]
            places = [i + 0.1 * shift - 0.15 for i in found]
            errors = [2 * statistics.stdev(r) / len(r) ** 0.5 if len(r) >= SEEDS else 0.0 for r in rows]
            means = [statistics.mean(r) for r in rows]
            axes.errorbar(
                places, means, errors, fmt="o-", markersize=3, linewidth=0.8, capsize=2, label=LABELS[method]
            )
        if (model, 0.0, DENSE) in by_row:
            level = statistics.mean(by_row[model, 0.0, DENSE])
            axes.axhline(level, color="gray", linewidth=0.8, label=DENSE)
        axes.set_xticks(range(len(SPARSITIES)), [f"{sparsity:.0%}" for sparsity in SPARSITIES])
        axes.set_xlabel("zeros")
        axes.set_ylabel(next(task.score for name, task in TASKS.items() if model in MODELS[name]))
        axes.set_title(model)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _of(cells: Sequence[Cell], *row: object) -> list[Cell]:
    return [c for c in cells if (c.settings["model"], c.settings["sparsity"], c.settings["method"]) == row]


def _place(row: tuple[tuple[str, float, str], object]) -> tuple[int, float, int]:
    model, sparsity, method = row[0]
    return ALL_MODELS.index(model), sparsity or 1.0, list(LABELS).index(method)


def _median(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.1f}" if found else ""


def _options() -> Any:
    made = parser(__doc__, output="benchmarks/results/gse_training.json", figure="the scores by sparsity")
    made.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    made.add_argument("--seeds", type=int, help="of every task (default: %(default)s)", default=SEEDS)
    return made.parse_args()


if __name__ == "__main__":
    main()
