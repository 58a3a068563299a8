"""What Spartan loses at a budget of time: entries priced by measured latency against one sparsity for all layers.

    python -m benchmarks.equal_latency

The digits' models train with Spartan under ``Budget(latency=share)`` for a batch of 64 images: "priced" ranks all
weights together by magnitude per microsecond, "uniform" keeps the same share of every layer.  Both spend the same
budget; the share that the model takes in the end is measured after ``compile(mode="infer")``, beside a dense model that
is compiled so too.  Steps, seeds, initial weights, learning rate and schedule are the same; none was tuned.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate

import fxsparse
from benchmarks.cells import Cell, Settings, environments, parser, run_cells
from benchmarks.tasks.comparison import DENSE, paired
from benchmarks.tasks.digits import TASK
from fxsparse import Budget, Plan
from fxsparse.demo.digits import train
from fxsparse.inference import speed_of
from fxsparse.methods import spartan

SHARES = {"ViT": (0.5, 0.4), "ResNet": (0.6, 0.5), "MLP": (0.3, 0.2)}
"""Of the time of dense, by model: what its layers can come to."""
UNIFORM, PRICED = "uniform", "priced"
RATE = TASK.rates[1]


def main() -> None:
    """Run what is missing of the grid, and print the table."""
    options = parser(__doc__, "benchmarks/results/equal_latency.json").parse_args()
    torch.set_num_threads(options.threads)
    cells = run_cells(grid(1 if options.quick else TASK.seeds), measure, options.output, 20)
    print(f"\n{environments(cells)}")
    print(table(cells))


def grid(seeds: int) -> list[dict[str, Any]]:
    """Settings of every run."""
    kinds = [(model, 1.0, DENSE) for model in SHARES]
    kinds += [
        (m, share, how) for m, shares in SHARES.items() for share in shares for how in (UNIFORM, PRICED)
    ]
    return [
        {"model": model, "share": share, "allocation": how, "steps": TASK.steps, "seed": seed}
        for model, share, how in kinds
        for seed in range(seeds)
    ]


def measure(settings: Settings) -> dict[str, Any]:
    """Train, score, compile for inference and time one model."""
    torch.manual_seed(settings["seed"])
    model = TASK.models[settings["model"]]()
    images = TASK.draw(torch.Generator().manual_seed(settings["seed"]))[0]
    if settings["allocation"] == DENSE:
        train(model, TASK.draw, steps=settings["steps"], seed=settings["seed"], rate=TASK.rates[0])
        return {"score": TASK.evaluate(model), "share": 1.0, "sparsity": 0.0}
    sparse = fxsparse.compile(model, plan_of(settings), example_inputs=images)
    train(sparse, TASK.draw, steps=settings["steps"], seed=settings["seed"], rate=RATE, attach=sparse.attach)
    score, dense = TASK.evaluate(sparse), TASK.models[settings["model"]]().eval()
    full, fast = (fxsparse.compile(each, mode="infer", example_inputs=images) for each in (dense, sparse))
    share = 1 / speed_of(full, fast, images, 31).ratio
    return {"score": score, "share": share, "sparsity": sparse.sparsity()["total"]}


def plan_of(settings: Settings) -> Plan:
    """Spartan under a budget of time."""
    priced = settings["allocation"] == PRICED
    return Plan(
        budget=Budget(latency=settings["share"]),
        allocation="global_magnitude" if priced else "uniform",
        method=spartan(steps=settings["steps"], scope="global" if priced else "layer"),
        seed=settings["seed"],
    )


def table(cells: Sequence[Cell]) -> str:
    """Means over seeds, and the paired difference of priced to uniform, in GitHub's markdown."""
    kinds: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell in cells:
        s = cell.settings
        kinds.setdefault((s["model"], s["share"], s["allocation"]), []).append(cell.result)
    rows = []
    for (model, share, how), results in kinds.items():
        score, taken, zeros = ([r[key] for r in results] for key in ("score", "share", "sparsity"))
        gain = paired(score, [r["score"] for r in kinds[model, share, UNIFORM]]) if how == PRICED else None
        rows.append(
            [
                model,
                how,
                f"{share:.2f}",
                f"{statistics.median(taken):.2f}",
                f"{statistics.mean(zeros):.1%}",
                f"{statistics.mean(score):.2f}",
                f"{gain.mean:+.2f} ± {gain.error:.2f}" if gain else "",
            ]
        )
    headers = ["model", "allocation", "asked", "measured", "zeros", TASK.score, "difference to uniform"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
