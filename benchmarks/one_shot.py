"""What one-shot pruning costs two trained models, by method and pattern: ``python -m benchmarks.one_shot [-o FILE]``.

The byte-level language model and the digits' ViT are trained dense, pruned without training on, and scored on held-out
data before and after; every seed has a model of its own.  Calibration batches are training inputs.  The last layer
stays dense, as in the papers; all others get the same sparsity.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

import fxsparse
from benchmarks.cells import Cell, Settings, environments, parser, run_cells
from benchmarks.tasks import bytes as language
from benchmarks.tasks import digits
from benchmarks.tasks.comparison import DENSE, Task, run, settings_of
from fxsparse import Plan, Report
from fxsparse.method import Method
from fxsparse.methods import sparsegpt, static, wanda
from fxsparse.pattern import NM, Pattern, Unstructured

TASKS: dict[str, tuple[Task, str, int]] = {
    "language model": (language.TASK, "transformer", 150),
    "digits": (digits.TASK, "ViT", 200),
}
"""{name: (task, model, training steps)}"""
METHODS: dict[str, Method] = {"magnitude": static("magnitude"), "wanda": wanda(), "sparsegpt": sparsegpt()}
PATTERNS: dict[str, tuple[float, Pattern]] = {
    "50 %": (0.5, Unstructured()),
    "2:4": (0.5, NM(2, 4)),
}
LAST = ("head",)
BATCHES, SEEDS = 8, 3


def main() -> None:
    """Run the grid and print the table."""
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    seeds, share = (1, 5) if options.quick else (SEEDS, 1)
    grid = [
        {"name": name, "batches": BATCHES} | settings_of(task, model, DENSE, 0.0, steps // share, seed)
        for name, (task, model, steps) in TASKS.items()
        for seed in range(seeds)
    ]
    cells = run_cells(grid, measure, options.output, seconds=40)
    print(f"\n{environments(cells)}; {BATCHES} calibration batches, {seeds} seed(s)")
    print(table(cells))


def measure(settings: Settings) -> dict[str, Any]:
    """Train one model; scores, relative output errors and seconds of all that is made of it, and its own score."""
    task = TASKS[settings["name"]][0]
    model, dense = run(task, settings)
    generator = torch.Generator().manual_seed(1000 + settings["seed"])
    calibration = [task.draw(generator)[0] for _ in range(settings["batches"])]
    rows = [
        {"pattern": pattern, "method": method} | pruned(task, model, pattern, method, calibration)
        for pattern in PATTERNS
        for method in METHODS
    ]
    return {"dense": dense["score"], "rows": rows}


def pruned(
    task: Task, model: torch.nn.Module, pattern: str, method: str, calibration: Sequence[torch.Tensor]
) -> dict[str, float]:
    """What one method makes of a trained model."""
    sparsity, kind = PATTERNS[pattern]
    plan = Plan(sparsity=sparsity, pattern=kind, method=METHODS[method], allocation="uniform", exclude=LAST)
    report = Report()
    made = fxsparse.prune(model, plan, calibration=calibration, report=report)
    error = statistics.mean(row["output_error"] for row in report.layers)
    return {"score": task.evaluate(made), "error": error}


def table(cells: Sequence[Cell]) -> str:
    """Means over seeds of scores, of what pruning did to them (by seed, too) and of output errors."""
    rows = []
    for name in dict.fromkeys(cell.settings["name"] for cell in cells):
        results = [cell.result for cell in cells if cell.settings["name"] == name]
        title = f"{name} ({TASKS[name][0].score})"
        dense = [result["dense"] for result in results]
        rows.append([title, "dense", "", f"{statistics.mean(dense):.3f}", "", ""])
        for same in zip(*(result["rows"] for result in results), strict=True):
            lost = [row["score"] - before for row, before in zip(same, dense, strict=True)]
            rows.append(
                [
                    title,
                    same[0]["pattern"],
                    same[0]["method"],
                    f"{statistics.mean(row['score'] for row in same):.3f}",
                    f"{statistics.mean(lost):+.3f} ({min(lost):+.3f} to {max(lost):+.3f})",
                    f"{statistics.mean(row['error'] for row in same):.2f}",
                ]
            )
    headers = ["task", "zeros", "method", "score", "by pruning (lowest to highest)", "error of outputs"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
