"""Methods side by side on a task: the same steps and seeds for each, and paired differences to one of them.

A method is written ``name:option=value,...`` with the options of its function; ``allocation`` and ``storage`` among
them go to the plan.  Updates come every 20 steps in the first three quarters of the training unless an option says
otherwise.
"""

import functools
import inspect
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim import AdamW

import fxsparse
from benchmarks.cells import Cell, Settings, environments, parser, run_cells
from fxsparse import Plan, transforms
from fxsparse.demo.digits import train
from fxsparse.methods import METHODS, from_dict

DENSE = "dense"
EVERY = 20
PLAN_FIELDS = {"storage": "masked", "allocation": "erk", "transform": None}


@dataclass(frozen=True)
class Task:
    """Models, the batches they train on, and how well a trained one does on held-out examples."""

    name: str
    score: str
    """Column title of what `evaluate` returns."""
    models: Mapping[str, Callable[[], nn.Module]]
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    """Inputs and int64 labels of one batch."""
    evaluate: Callable[[nn.Module], float]
    """Of a trained model on the held-out examples, after the last step; leaves it in eval mode."""
    steps: int
    seeds: int
    seconds: float
    """Rough time of one run on one core."""
    rates: tuple[float, float]
    """Peak learning rates, dense and sparse."""
    identity: Callable[[], Mapping[str, Any]]
    """What the settings of a cell say about the data, where that differs between machines."""


def compare(task: Task) -> None:
    """The command line of a task: run the grid, print the table."""
    options = _options(task)
    seeds, steps = (1, task.steps // 5) if options.quick else (options.seeds, options.steps)
    grid = [
        settings_of(task, model, method, sparsity, steps, seed)
        for model in options.models
        for sparsity, method in _rows(options.methods, options.sparsity)
        for seed in range(seeds)
    ]
    cells = run_cells(grid, lambda s: run(task, s)[1], options.output, task.seconds * steps / task.steps)
    print(f"\n{environments(cells)}; {steps} steps, {seeds} seed(s)")
    print(table(task, cells, options.reference or options.methods[0]))


def settings_of(
    task: Task, model: str, method: str, sparsity: float, steps: int, seed: int
) -> dict[str, Any]:
    """What identifies one run."""
    row = {"model": model, "method": method, "sparsity": sparsity, "steps": steps, "seed": seed}
    return {"task": task.name, **task.identity(), **row}


def run(
    task: Task,
    settings: Settings,
    watch: Callable[[nn.Module, AdamW], object] | None = None,
    plan: Plan | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one model and score it; `watch` gets it and its optimizer before the first step.

    `plan` is that of a sparse run, in place of what `plan_of` reads in the settings.

    Returns:
        the trained model in eval mode, and its score, milliseconds per step, and the bytes of parameters, buffers and
        optimizer state at the end.
    """
    torch.manual_seed(settings["seed"])
    model = task.models[settings["model"]]()
    optimizers: list[AdamW] = []
    attach: list[Callable[[AdamW], Any]] = [optimizers.append]
    groups = None
    dense = settings["method"] == DENSE
    if not dense:
        inputs = task.draw(torch.Generator().manual_seed(settings["seed"]))[0]
        model = fxsparse.compile(model, plan or plan_of(settings), example_inputs=(inputs,))
        attach.append(model.attach)
        groups = model.parameter_groups
    if watch is not None:
        attach.append(functools.partial(watch, model))
    began = time.perf_counter()
    train(
        model,
        task.draw,
        steps=settings["steps"],
        seed=settings["seed"],
        rate=task.rates[0 if dense else 1],
        attach=lambda optimizer: [call(optimizer) for call in attach],
        groups=groups,
    )
    ms = 1e3 * (time.perf_counter() - began) / settings["steps"]
    state = _bytes(model, optimizers[0])
    return model, {"score": task.evaluate(model), "step_ms": round(ms, 2), "state_bytes": state}


def plan_of(settings: Settings) -> Plan:
    """The plan of a sparse run."""
    name, options = read_method(settings["method"])
    plan = {key: options.pop(key, default) for key, default in PLAN_FIELDS.items()}
    if plan["transform"] is not None:
        plan["transform"] = transforms.from_dict({"name": plan["transform"]})
    # A multiple, so that GMP's ramp ends on an update.
    stop = max(EVERY, 3 * settings["steps"] // 4 // EVERY * EVERY)
    scheduled = {"every": EVERY, "stop": stop} | ({"start": 0} if name == "gmp" else {})
    known = inspect.signature(_METHODS[name]).parameters
    fields = {key: value for key, value in scheduled.items() if key in known} | options
    method = from_dict({"name": name, **fields})
    return Plan(sparsity=settings["sparsity"], method=method, seed=settings["seed"], **plan)


def read_method(text: str) -> tuple[str, dict[str, Any]]:
    """``"rigl:every=50,variant=torch"`` -> ``("rigl", {"every": 50, "variant": "torch"})``.

    Raises:
        ValueError: no such method, or an option without a value.
    """
    name, _, rest = text.partition(":")
    if name not in _METHODS:
        raise ValueError(f"method {text!r}: expected one of {DENSE}, {', '.join(_METHODS)}, got {name!r}.")
    pairs = [part.partition("=") for part in rest.split(",") if part]
    if any(not value for _, _, value in pairs):
        raise ValueError(f"method {text!r}: expected name:option=value,... after the name.")
    return name, {key: _value(value) for key, _, value in pairs}


@dataclass(frozen=True)
class Paired:
    """Mean difference of two methods over the same seeds, and its standard error (NaN for one seed)."""

    mean: float
    error: float

    @property
    def equal(self) -> bool:
        """Within two standard errors of 0."""
        return abs(self.mean) <= 2 * self.error


def paired(scores: Sequence[float], reference: Sequence[float]) -> Paired:
    """Of scores and reference scores in the same order of seeds."""
    differences = [a - b for a, b in zip(scores, reference, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return Paired(statistics.mean(differences), error)


def scores(cells: Sequence[Cell]) -> dict[tuple[str, float, str], list[float]]:
    """{(model, sparsity, method): score of every seed}, in the order of the cells."""
    found: dict[tuple[str, float, str], list[float]] = {}
    for cell in cells:
        s = cell.settings
        found.setdefault((s["model"], s["sparsity"], s["method"]), []).append(cell.result["score"])
    return found


def table(task: Task, cells: Sequence[Cell], reference: str) -> str:
    """Means over seeds, and the paired difference to `reference` at the same sparsity, in GitHub's markdown."""
    by_row = scores(cells)
    rows = []
    for (model, sparsity, method), values in by_row.items():
        of_row = [c for c in cells if _is(c, model, sparsity, method)]
        against = by_row.get((model, sparsity, reference))
        compared = method not in (reference, DENSE) and against is not None
        rows.append(
            [
                model,
                f"{sparsity:.0%}",
                method,
                f"{statistics.mean(values):.2f}",
                _deviation(values),
                _difference(paired(values, against)) if compared and against else "",
                f"{statistics.median(c.result['step_ms'] for c in of_row):.1f}",
                f"{of_row[0].result['state_bytes'] / 1e6:.2f}",
            ]
        )
    headers = [
        "model",
        "zeros",
        "method",
        task.score,
        "deviation",
        f"difference to {reference}",
        "ms a step",
        "state (MB)",
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


_METHODS: dict[str, Callable[..., Any]] = {method.__name__.rstrip("_"): method for method in METHODS}


def _options(task: Task) -> Any:
    made = parser(inspect.getdoc(inspect.getmodule(task.evaluate)))
    made.add_argument("--models", nargs="+", default=list(task.models), choices=task.models)
    made.add_argument(
        "--methods", nargs="+", default=["rigl", "set", "static", "gmp", DENSE], metavar="METHOD"
    )
    made.add_argument("--sparsity", nargs="+", type=float, default=[0.9])
    made.add_argument("--seeds", type=int, default=task.seeds)
    made.add_argument("--steps", type=int, default=task.steps)
    made.add_argument(
        "--reference", metavar="METHOD", help="of the paired differences (default: the first method)"
    )
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    for method in (*options.methods, options.reference or DENSE):
        if method != DENSE:
            read_method(method)
    return options


def _rows(methods: Sequence[str], sparsities: Sequence[float]) -> list[tuple[float, str]]:
    rows = [(sparsity, method) for sparsity in sparsities for method in methods if method != DENSE]
    return rows + ([(0.0, DENSE)] if DENSE in methods else [])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _bytes(model: nn.Module, optimizer: AdamW) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is(cell: Cell, model: str, sparsity: float, method: str) -> bool:
    return (cell.settings["model"], cell.settings["sparsity"], cell.settings["method"]) == (
        model,
        sparsity,
        method,
    )


def _deviation(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"


def _difference(of: Paired) -> str:
    if math.isnan(of.error):
        return f"{of.mean:+.2f}"
    return f"{of.mean:+.2f} ± {of.error:.2f}" + ("" if of.equal else " (!)")
