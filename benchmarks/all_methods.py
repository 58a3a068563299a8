"""Every method at 90 and 98 % of zeros, on the digits (ViT, CNN) and a byte-level language model, in one recipe.

    python -m benchmarks.all_methods --figure docs/all_methods.png

Optimizer, batch, seeds, peak learning rate (one for dense, one for all sparse training) and allocation (ERK; 2:4 is
uniform) are the same for all; `benchmarks.tasks.every_method` says how schedules are scaled, and what little was tuned.
Trainings are shorter than the tasks' own, so that the table takes two to three hours of a core.  Storage is masked
throughout, so that steps and bytes compare methods, not storages.  References: dense training, static random masks,
and what one-shot pruning makes of the dense model.  Scores are those after the last step.

FLOPs are those of all training steps over dense training's, by `fxsparse.count_flops`, with ramps and updates averaged
over the whole training; a method that learns its counts is taken at their mean over training.  Times are the
processor's, for this process; memory is parameters, buffers, optimizer state and gradients.
"""

import functools
import statistics
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import fxsparse
from benchmarks.all_methods_table import table
from benchmarks.cells import Settings, environments, parser, read_cells, run_cells
from benchmarks.gse_training import Watch
from benchmarks.pareto import draw
from benchmarks.tasks import bytes as byte_text
from benchmarks.tasks import digits
from benchmarks.tasks.comparison import DENSE, Task, run, settings_of
from benchmarks.tasks.every_method import (
    ONE_SHOT,
    PATTERNS,
    ROWS,
    SPARSITY_OF_PATTERNS,
    options_of,
    plan_of,
    recipe_of,
)
from fxsparse import Plan, SparseModule

TASKS = {"digits": digits.TASK, "bytes": byte_text.TASK}
MODELS = {"digits": ("ViT", "CNN"), "bytes": ("transformer",)}
SPARSITIES = (0.9, 0.98)
STEPS, SEEDS, CALIBRATION = 200, 3, 8
PROBED, OVERHEAD = 3, 3.0
"""Steps that the cost of a method is estimated from, and the seconds of a cell beside its steps."""


def main() -> None:
    """Run the grid, print the tables, and draw the figure."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    grid = [s for name in given.tasks for s in grid_of(name, given.seeds, given.quick)]
    if given.finished:
        cells = [cell for cell in read_cells(given.output) if cell.settings in grid]
        print(f"{len(cells)} of {len(grid)} cells are finished")
    else:
        cells = run_cells(grid, measure, given.output, seconds=3 if given.quick else cost)
    print(f"\n{environments(cells)}\n{table(cells, TASKS, SPARSITIES)}")
    if given.figure:
        draw(cells, given.figure)


def grid_of(name: str, seeds: int, quick: bool = False) -> list[Settings]:
    """The cells of one task seed by seed, 90 % first (with it dense and 2:4): a stopped run leaves whole seeds."""
    task, steps, levels = TASKS[name], STEPS, SPARSITIES
    if quick:
        seeds, steps, levels = 1, 40, SPARSITIES[:1]
    return [
        settings_of(task, model, row, sparsity, steps, seed)
        | {"options": options(task, model, row, sparsity, steps)}
        for seed in range(seeds)
        for level in levels
        for model in MODELS[name]
        for row, sparsity in rows_at(level)
    ]


def options(task: Task, model: str, row: str, sparsity: float, steps: int) -> dict[str, Any]:
    """What a cell says of its method, so that another recipe makes another cell."""
    if row == DENSE:
        return {}
    return options_of(row, recipe_of(task.models[model](), steps, task.rates[1], sparsity))


def rows_at(level: float) -> list[tuple[str, float]]:
    """(row, sparsity) of the cells that are run with a level."""
    first = level == SPARSITIES[0]
    fixed = [(row, SPARSITY_OF_PATTERNS) for row in PATTERNS] if first else []
    return ([(DENSE, 0.0)] if first else []) + [(row, level) for row in ROWS if row not in PATTERNS] + fixed


def measure(settings: Settings) -> dict[str, Any]:
    """Score, share of dense training's FLOPs, zeros at the end, times of steps and bytes of one cell.

    Raises:
        ValueError: the zeros are not what the plan promises, and the method is not one whose count may differ.
    """
    row = settings["method"]
    if row == DENSE or row in ONE_SHOT:
        model, result = _trained_dense(_dense_of(settings))
        found = {"train_ratio": 1.0, "zeros": 0.0, "exact": True}
        return dict(result) | (found if row == DENSE else _pruned(model, settings))
    plan, watch, counts = _plan(settings), Watch(), ActiveCounts()
    watches = [watch.attach, counts.attach] if plan.method.learned_nnz else [watch.attach]
    model, result = run(
        TASKS[settings["task"]], settings, lambda *to: [attach(*to) for attach in watches], plan
    )
    assert isinstance(model, SparseModule)
    wanted = sum(layer["nnz"] for layer in model.report.layers)
    kept = sum(int(mask.sum()) for mask in model.masks().values())
    exact = not plan.method.learned_nnz and not plan.method.varying_nnz
    if exact and kept != wanted:
        raise ValueError(f"{row}: expected {wanted} nonzeros after {settings['steps']} steps, got {kept}.")
    zeros = 1 - kept / sum(mask.numel() for mask in model.masks().values())
    counted = replace(plan, allocation=counts.means()) if plan.method.learned_nnz else plan
    flops = {
        "train_ratio": round(train_ratio(settings, counted), 4),
        "zeros": round(zeros, 5),
        "exact": exact,
    }
    return result | watch.found(plan.method.schedule) | flops


@dataclass
class ActiveCounts:
    """Active entries of each weight over a training, after the first of every ten steps."""

    found: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    steps: int = 0

    def attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """From here on."""
        assert isinstance(model, SparseModule)

        def stepped(*_: object) -> None:
            if self.steps % 10 == 0:
                for name, mask in model.masks().items():
                    self.found[name].append(int(mask.sum()))
            self.steps += 1

        optimizer.register_step_post_hook(stepped)

    def means(self) -> dict[str, int]:
        """{weight: mean}, at least 1 as an allocation has it."""
        return {name: max(1, round(statistics.mean(counts))) for name, counts in self.found.items()}


def train_ratio(settings: Settings, plan: Plan) -> float:
    """FLOPs of all steps over dense training's; the schedule is counted to the last step, not to its own end."""
    task, schedule = TASKS[settings["task"]], plan.method.schedule
    if schedule is not None:
        steps = settings["steps"]
        whole = replace(schedule, at=tuple(schedule.updates(steps)), stop=steps, start=0)
        plan = replace(plan, method=replace(plan.method, schedule=whole))
    torch.manual_seed(settings["seed"])
    return fxsparse.count_flops(task.models[settings["model"]](), _inputs(settings), plan).train_ratio


def cost(settings: Settings) -> float:
    """Seconds of a cell, from the first steps of its method; a rough addition for compiling, updates and scoring."""
    if settings["method"] in ONE_SHOT:
        return OVERHEAD
    return OVERHEAD + settings["steps"] * _step_seconds(
        settings["task"], settings["model"], settings["method"]
    )


def _plan(settings: Settings) -> Plan:
    task = TASKS[settings["task"]]
    model = task.models[settings["model"]]()
    recipe = recipe_of(model, settings["steps"], task.rates[1], settings["sparsity"])
    return plan_of(settings["method"], recipe, settings["seed"], model)


def _inputs(settings: Settings) -> torch.Tensor:
    return TASKS[settings["task"]].draw(torch.Generator().manual_seed(settings["seed"]))[0]


def _dense_of(settings: Settings) -> tuple[str, str, int, int]:
    return settings["task"], settings["model"], settings["steps"], settings["seed"]


@functools.lru_cache(maxsize=4)
def _trained_dense(of: tuple[str, str, int, int]) -> tuple[nn.Module, dict[str, Any]]:
    """Shared by the dense row and the one-shot ones of a seed."""
    name, model, steps, seed = of
    watch, task = Watch(), TASKS[name]
    made, result = run(task, settings_of(task, model, DENSE, 0.0, steps, seed), watch.attach)
    return made, result | watch.found(None)


def _pruned(model: nn.Module, settings: Settings) -> dict[str, Any]:
    task, plan = TASKS[settings["task"]], _plan(settings)
    generator = torch.Generator().manual_seed(1000 + settings["seed"])
    calibration = [task.draw(generator)[0] for _ in range(CALIBRATION)]
    report = fxsparse.Report()
    made = fxsparse.prune(model, plan, calibration=calibration, report=report)
    weights = dict(made.named_parameters())
    kept = sum(int(weights[layer["name"]].count_nonzero()) for layer in report.layers)
    wanted = sum(layer["nnz"] for layer in report.layers)
    if kept != wanted:
        raise ValueError(f"{settings['method']}: expected {wanted} nonzeros, got {kept}.")
    zeros = 1 - kept / sum(layer["numel"] for layer in report.layers)
    return {"score": task.evaluate(made), "train_ratio": 1.0, "zeros": round(zeros, 5), "exact": True}


def _unscored(_: nn.Module) -> float:
    return 0.0


@functools.cache
def _step_seconds(name: str, model: str, row: str) -> float:
    """Median of the first three steps."""
    task, watch = TASKS[name], Watch()
    sparsity = 0.0 if row == DENSE else SPARSITY_OF_PATTERNS if row in PATTERNS else SPARSITIES[0]
    settings = settings_of(task, model, row, sparsity, task.steps, 0)
    plan = None if row == DENSE else _plan(settings)
    run(replace(task, evaluate=_unscored), settings | {"steps": PROBED}, watch.attach, plan)
    return watch.found(None)["processor_ms"] / 1e3


def _arguments() -> Any:
    made = parser(__doc__, output="benchmarks/results/all_methods.json", figure="scores by training FLOPs")
    made.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    made.add_argument("--seeds", type=int, help="of every task (default: %(default)s)", default=SEEDS)
    return made.parse_args()


if __name__ == "__main__":
    main()
