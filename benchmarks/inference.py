"""Inference of pruned models on the CPU: fxsparse beside torch, Inductor, MKL CSR, ONNX Runtime and DeepSparse.

    python -m benchmarks.inference [--quick] [--models NAME ...] [--deepsparse PYTHON] [--figure FILE]

Linear layers and whole models with random weights, zeros by magnitude, the same share in every layer; stem and head
stay dense, as do embeddings and depthwise convolutions.  All rivals of a cell are in one run and take turns; Inductor
runs with freezing.  A turn of a call below a millisecond is up to 20 calls in a row.  Ratios are rival time / our time:
below 1 we lose.  DeepSparse 1.8 runs in a process of its own Python (its licence is for evaluation, and its
requirements clash), by its own clock.  Outputs are compared with the eager model's.
"""

import itertools
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._inductor import config as inductor

from benchmarks.cells import Settings, environments, parser, read_cells, run_cells
from benchmarks.inference_tables import draw, tables
from benchmarks.models.published import LINEAR, MODELS, WHOLE
from benchmarks.rivals import CSR, DEEPSPARSE, ONNX_RUNTIME, TORCH, Rivals, errors, memory, rivals
from fxsparse.timing import interleaved_samples

SPARSITIES = {"linear": (0.0, 0.3, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99), "whole": (0.0, 0.8, 0.9, 0.95, 0.98)}
BATCHES = {"linear": (1, 16, 256), "whole": (1, 16)}
NEVER_SLOWER = (0.0, 0.5, 0.9), 64
"""Sparsities and the batch at which whole models run on one thread beside torch alone."""
QUICK = ("768x3072", "ResNet-18", "BERT-base")
SECONDS, LONGEST = 12.0, 120.0
"""Rounds go on for about SECONDS, at least 15 of them; fewer, but five, where 15 would take more than LONGEST."""
_TURN_US = 1000
_INSTALLED = re.compile(r"\(\S*/site-packages/")
"""Where packages lie on the machine at hand, in notes that name a line of one."""


def main() -> None:
    """Run what is missing, then print the tables and draw the figure."""
    options = _options()
    cells = grid(options.models, options.deepsparse is not None, options.quick)
    if options.finished:
        done = read_cells(options.output)
        print(f"{sum(cell.settings in cells for cell in done)} of {len(cells)} cells are finished")
    else:
        done = run_cells(
            cells, lambda cell: measure(cell, options.deepsparse), options.output, seconds=expected_seconds
        )
    print(f"\n{environments(done)}\n\n{tables(done)}")
    if options.deepsparse is None:
        print("\nDeepSparse: not measured, since no Python that has it was given (--deepsparse)")
    if options.figure:
        draw(done, options.figure)


def grid(models: Sequence[str], deepsparse: bool, quick: bool = False) -> list[Settings]:
    """The cells, those of most interest first: one thread before two, small batches, 90 %."""
    if quick:
        return [_cell(model, 0.9, 1, 1, deepsparse) for model in models if model in QUICK]
    cells = [
        _cell(model, sparsity, batch, threads, deepsparse)
        for threads, model in itertools.product((1, 2), models)
        for batch, sparsity in itertools.product(BATCHES[_kind(model)], SPARSITIES[_kind(model)])
    ]
    sparsities, batch = NEVER_SLOWER
    whole = [model for model in models if model in WHOLE]
    cells += [
        _cell(model, sparsity, batch, 1, False) | {"rivals": list(TORCH)}
        for model, sparsity in itertools.product(whole, sparsities)
    ]
    # `sorted` keeps the order of models.
    return sorted(cells, key=lambda c: (c["threads"], c["batch"], abs(c["sparsity"] - 0.9)))


def expected_seconds(cell: Settings) -> float:
    """A guess at what a cell takes, to announce the cost: whole models load for minutes in DeepSparse."""
    if cell["model"] in LINEAR:
        return 60.0
    return min(1200.0, 180.0 + 60 * cell["batch"] ** 0.5)


def measure(settings: Settings, python: str | None = None) -> dict[str, Any]:
    """Times of all rivals, their errors, and what our artefact holds; see also `_artefact`.

    "us": {rival: [least, lower quartile, median, upper quartile]} of a call; "ratios": {rival: median over turns of
    its time / ours, and "compiled, both": compiled / ours compiled}; "seconds": {rival: of making it}.
    """
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    with torch.no_grad(), inductor.patch(freezing=True):
        published = MODELS[settings["model"]]
        model, x = published.pruned(settings["sparsity"]), published.inputs(settings["batch"])
        with rivals(model, x, tuple(settings["rivals"]), python) as made:
            result = {"errors": errors(made), "seconds": made.seconds, "peak_bytes": memory(made)}
            samples = _samples(made)
    taken = {name: _spread(values) for name, values in samples.items()}
    result |= {"us": taken, "rounds": len(samples["ours"]), "ratios": _ratios(samples)}
    return result | _artefact(made)


def _samples(made: Rivals) -> dict[str, list[float]]:
    first = _turns(made, 2, {})
    single = {name: min(values) for name, values in first.items()}
    inner = {name: max(1, min(20, int(_TURN_US / us))) for name, us in single.items()}
    one = sum(single[name] * inner[name] for name in single) / 1e6
    rounds = min(101, max(15, int(SECONDS / one)))
    if rounds * one <= LONGEST:
        return _turns(made, rounds, inner)
    more = _turns(made, max(5, min(rounds, int(LONGEST / one))) - 2, inner, warm_up=0)
    return {name: values + more[name] for name, values in first.items()}


def _turns(made: Rivals, rounds: int, inner: Mapping[str, int], warm_up: int = 1) -> dict[str, list[float]]:
    calls: dict[str, Callable[[], object]] = dict(made.calls)
    theirs: list[float] = []
    engine, runs = made.deepsparse, inner.get(DEEPSPARSE, 1)
    if engine is not None:
        calls[DEEPSPARSE] = lambda: theirs.append(engine.microseconds(runs))
    repeats = dict.fromkeys(calls, 1) | dict(inner) | {DEEPSPARSE: 1}
    found = interleaved_samples(calls, rounds=rounds, warm_up=warm_up, inner=repeats)
    return found if engine is None else found | {DEEPSPARSE: theirs[warm_up:]}


def _spread(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in (min(values), *statistics.quantiles(values, n=4))]


def _ratios(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    found = {
        name: _median_ratio(values, samples["ours"]) for name, values in samples.items() if name != "ours"
    }
    if "ours compiled" in samples:
        found["compiled, both"] = _median_ratio(samples["compiled"], samples["ours compiled"])
    return found


def _median_ratio(of: Sequence[float], to: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(of, to, strict=True)), 4)


def _artefact(made: Rivals) -> dict[str, Any]:
    """Share of the FLOPs of nonzeros in pruned weights that is in sparse kernels, {kernel: weights}, bytes."""
    report = made.ours.report
    pruned = [row for row in report.layers if row["sparsity"] > 0]
    work = sum(row["flops_sparse"] for row in pruned)
    sparse = sum(row["flops_sparse"] for row in pruned if row["format"] != "dense")
    kernels: dict[str, int] = {}
    for row in report.layers:
        kernels[row["kernel"]] = kernels.get(row["kernel"], 0) + 1
    return {
        "share": round(sparse / work, 4) if work else None,
        "kernels": kernels,
        "bytes": {name: report.totals[f"bytes_{name}"] for name in ("dense", "sparse")},
        "notes": [_INSTALLED.sub("(", note) for note in report.notes],
    }


def _cell(model: str, sparsity: float, batch: int, threads: int, deepsparse: bool) -> dict[str, Any]:
    others = [*([CSR] if model in LINEAR else []), ONNX_RUNTIME, *([DEEPSPARSE] if deepsparse else [])]
    return {
        "model": model,
        "sparsity": sparsity,
        "batch": batch,
        "threads": threads,
        "rivals": [*TORCH, *others],
    }


def _kind(model: str) -> str:
    return "linear" if model in LINEAR else "whole"


def _options() -> Any:
    made = parser(__doc__, output="benchmarks/results/inference.json", figure="our speed-ups")
    made.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    python = os.environ.get("FXSPARSE_DEEPSPARSE_PYTHON")
    made.add_argument("--deepsparse", metavar="PYTHON", default=python, help="a Python with deepsparse 1.8")
    return made.parse_args()


if __name__ == "__main__":
    main()
