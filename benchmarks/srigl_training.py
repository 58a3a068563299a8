"""SRigL against RigL on the digits, and what its structure is worth at inference.

    python -m benchmarks.srigl_training --figure docs/srigl_training.png

Steps, seeds, learning rate, allocation (ERK), drop fraction (0.3), update period (20 steps) and what the optimizer does
at an update are the same for all.  gamma_sal is the one number that was looked at, 0.3 or 0.95 (the paper's for CNNs
and for ViT-B/16) on seeds 100 and 101: at 0.3 hardly a neuron goes, so it is 0.95 for all.  All start from the same
weights, the model's own; two rows more start SRigL from its default, N(0, 2/fan-in).  Linear layers train in compact
storage.  Accuracies are those after the last step.  ``--part inference`` trains the first seed again and compares the
compiled model with the same model dense, in turns, in one process.
"""

import functools
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from benchmarks.cells import Cell, Settings, environments, parser, run_cells
from benchmarks.tasks.comparison import DENSE, Paired, paired, run, scores, settings_of
from benchmarks.tasks.digits import TASK
from fxsparse import SparseModule
from fxsparse.inference import speed_of

LABELS = {
    "rigl:variant=torch,storage=compact": "RigL",  # the variant that steps at an update too, as SRigL does
    "srigl:gamma_sal=0.95,weight_init=keep,storage=compact": "SRigL",
    "srigl:ablate=false,weight_init=keep,storage=compact": "SRigL, no ablation",
    "srigl:gamma_sal=0.95,storage=compact": "SRigL from N(0, 2/k)",
    "srigl:ablate=false,storage=compact": "SRigL from N(0, 2/k), no ablation",
    DENSE: DENSE,
}
RIGL, SRIGL, WITHOUT_ABLATION, *_ = LABELS
SPARSE = [method for method in LABELS if method != DENSE]
PAIRS = [("ViT", 0.9), ("ViT", 0.95), ("ResNet", 0.9), ("ResNet", 0.95), ("MLP", 0.99)]
MODELS = ["ViT", "ResNet", "MLP"]
BATCHES = (1, 64)


def main() -> None:
    """Run the grid, print the tables, and draw the figure."""
    options = _options()
    torch.set_num_threads(options.threads)
    steps, seeds = (80, 1) if options.quick else (TASK.steps, TASK.seeds)
    setting = functools.partial(settings_of, TASK, steps=steps)
    pairs = [(model, sparsity) for model, sparsity in PAIRS if model in options.models]
    if "training" in options.part:
        rows = [(m, s, method) for m, s in pairs for method in SPARSE]
        rows += [(model, 0.0, DENSE) for model in dict.fromkeys(model for model, _ in pairs)]
        grid = [
            setting(model=m, method=method, sparsity=s, seed=seed)
            for m, s, method in rows
            for seed in range(seeds)
        ]
        cells = run_cells([{"part": "training"} | s for s in grid], train_cell, options.output, seconds=15)
        print(f"\n{environments(cells)}\n{training_table(cells)}\n\n{neuron_table(cells)}")
        if options.figure:
            draw(cells, options.figure)
    if "inference" in options.part:
        grid = [
            setting(model=m, method=method, sparsity=s, seed=0) for m, s in pairs for method in (RIGL, SRIGL)
        ]
        cells = run_cells([{"part": "inference"} | s for s in grid], infer_cell, options.output, seconds=30)
        print(f"\n{environments(cells)}\n{inference_table(cells)}")


def train_cell(settings: Settings) -> dict[str, Any]:
    """Score, and by weight: active neurons, all neurons, largest fan-in."""
    model, result = run(TASK, settings)
    masks = model.masks() if isinstance(model, SparseModule) else {}
    return result | {"neurons": {name: neurons(mask) for name, mask in masks.items()}}


def neurons(mask: Tensor) -> tuple[int, int, int]:
    """(neurons with an active entry, all neurons, largest fan-in)."""
    fan_in = mask.flatten(1).sum(1)
    return int((fan_in > 0).sum()), len(fan_in), int(fan_in.max())


def infer_cell(settings: Settings) -> dict[str, Any]:
    """Bytes on disk, and speed against the same model dense, of the compiled model at each batch size."""
    sparse, result = run(TASK, settings)
    assert isinstance(sparse, SparseModule)
    dense = sparse.to_dense().eval()
    found: dict[str, Any] = {"score": result["score"], "dense_bytes": saved_bytes(dense)}
    for batch in BATCHES:
        x = TASK.draw(torch.Generator().manual_seed(0))[0][:batch]
        fast = fxsparse.compile(sparse, mode="infer", example_inputs=(x,))
        speed = speed_of(dense, fast, (x,), pairs=31)
        found[f"batch_{batch}"] = {
            "bytes": saved_bytes(fast),
            "dense_us": round(speed.dense_us, 1),
            "sparse_us": round(speed.sparse_us, 1),
            "ratio": round(speed.ratio, 3),
        }
    return found


def saved_bytes(model: nn.Module) -> int:
    """Size of the model's state dict as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def training_table(cells: Sequence[Cell]) -> str:
    """Accuracies, paired differences to RigL, and the neurons and fan-in of all weights together."""
    by_row = scores(cells)
    rows = []
    for (model, sparsity, method), values in by_row.items():
        deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        row = [model, f"{sparsity:.0%}", LABELS[method], f"{statistics.mean(values):.2f}", deviation]
        if method.startswith("srigl") and len(values) > 1:
            against = paired(values, by_row[model, sparsity, RIGL])
            row += [f"{against.mean:+.2f} ± {against.error:.2f}", verdict(against)]
        else:
            row += ["", ""]
        rows.append([*row, active_neurons(_of(cells, model, sparsity, method))])
    headers = [
        "model",
        "zeros",
        "method",
        "accuracy (%)",
        "deviation",
        "difference to RigL",
        "within 2 errors",
    ]
    return tabulate(rows, [*headers, "active neurons"], tablefmt="github", disable_numparse=True)


def verdict(difference: Paired) -> str:
    """Whether a difference is within two standard errors, and on which side it is if not."""
    if difference.equal:
        return "yes"
    return "no, above" if difference.mean > 0 else "**no, below**"


def active_neurons(cells: Sequence[Cell]) -> str:
    """Mean over seeds, of how many."""
    counts = [cell.result["neurons"].values() for cell in cells]
    if not counts[0]:
        return ""
    active = statistics.mean(sum(row[0] for row in seed) for seed in counts)
    return f"{active:.0f} of {sum(row[1] for row in counts[0])}"


def neuron_table(cells: Sequence[Cell]) -> str:
    """By weight, for SRigL's first seed: active neurons of all, and the fan-in."""
    first = [c for c in cells if c.settings["seed"] == 0 and c.settings["method"].startswith("srigl")]
    rows = [
        [
            c.settings["model"],
            f"{c.settings['sparsity']:.0%}",
            LABELS[c.settings["method"]],
            name,
            f"{active} of {total}",
            fan_in,
        ]
        for c in first
        for name, (active, total, fan_in) in c.result["neurons"].items()
    ]
    headers = ["model", "zeros", "method", "weight", "active neurons", "fan-in"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def inference_table(cells: Sequence[Cell]) -> str:
    """Size and speed of the compiled models against the same models dense."""
    rows = []
    for cell in cells:
        s, r = cell.settings, cell.result
        size = r["batch_1"]["bytes"]
        rows.append(
            [
                s["model"],
                f"{s['sparsity']:.0%}",
                LABELS[s["method"]],
                f"{r['dense_bytes'] / 1e3:.0f}",
                f"{size / 1e3:.0f}",
                f"{size / r['dense_bytes']:.1%}",
                *(f"{r[f'batch_{batch}']['ratio']:.2f}x" for batch in BATCHES),
            ]
        )
    headers = ["model", "zeros", "method", "dense (kB)", "compiled (kB)", "of dense", "batch 1", "batch 64"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Accuracy differences with two standard errors, and the share of active neurons of every weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    by_row = scores(cells)
    pairs = [(model, sparsity) for model, sparsity, method in by_row if method == RIGL]
    for shift, method in enumerate((SRIGL, WITHOUT_ABLATION)):
        found = [paired(by_row[*pair, method], by_row[*pair, RIGL]) for pair in pairs]
        places = [i + 0.2 * shift - 0.1 for i in range(len(pairs))]
        errors = [2 * difference.error for difference in found]
        left.errorbar(places, [d.mean for d in found], errors, fmt="o", capsize=3, label=LABELS[method])
    left.axhline(0, color="gray", linewidth=0.8)
    left.set_xticks(range(len(pairs)), [f"{model}\n{sparsity:.0%}" for model, sparsity in pairs])
    left.set_ylabel("accuracy of SRigL - RigL (points),\nmean and two standard errors")
    left.legend(fontsize=8)
    for model, sparsity in pairs:
        rows = _of(cells, model, sparsity, SRIGL)
        shares = [
            statistics.mean(
                cell.result["neurons"][name][0] / cell.result["neurons"][name][1] for cell in rows
            )
            for name in rows[0].result["neurons"]
        ]
        right.plot(
            [i / (len(shares) - 1) for i in range(len(shares))],
            shares,
            "o-",
            markersize=3,
            label=f"{model}, {sparsity:.0%}",
        )
    right.set_xlabel("weight, first to last")
    right.set_ylabel("active neurons, share")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _of(cells: Sequence[Cell], *row: object) -> list[Cell]:
    return [c for c in cells if (c.settings["model"], c.settings["sparsity"], c.settings["method"]) == row]


def _options() -> Any:
    made = parser(__doc__, output="benchmarks/results/srigl_training.json")
    made.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    made.add_argument(
        "--part", nargs="+", default=["training", "inference"], choices=["training", "inference"]
    )
    made.add_argument("--figure", type=Path, metavar="FILE", help="draw the accuracies and active neurons")
    return made.parse_args()


if __name__ == "__main__":
    main()
