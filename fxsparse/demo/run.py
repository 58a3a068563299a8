"""Trains, compiles, measures, prints and writes the page."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from fxsparse import Plan, SparseModule
from fxsparse.demo.digits import DENSE_RATE, SPARSE_RATE, Digits, accuracy, load_digits, train
from fxsparse.demo.models import MODELS
from fxsparse.demo.outcome import Latency, Outcome, Table, tables
from fxsparse.demo.page import write_page
from fxsparse.methods import rigl
from fxsparse.timing import interleaved_medians

SPARSITY = 0.9
PRINTED = ("Notes", "Passes", "Layers")
ROUNDS = {1: 101, 64: 31}
"""Timed runs of each model, by batch size."""


def run(output: Path, *, steps: int = 400, seed: int = 0, threads: int = 1) -> list[Outcome]:
    """Train every model dense and at 90 % zeros, compile the sparse ones for inference, and report.

    Runs on `threads` threads; layers this small gain little from more, and lose much on a busy machine.

    Raises:
        UnsupportedError: scikit-learn or matplotlib is not installed.
    """
    digits = load_digits()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    outcomes = []
    for name, build in MODELS.items():
        outcomes.append(_outcome(name, build, digits, steps, seed))
        _print_reports(outcomes[-1])
    torch.set_num_threads(before)
    for table in tables(outcomes):
        _print(table)
    write_page(outcomes, output)
    print(f"\nThe report with plots is in {output}")
    return outcomes


def _outcome(name: str, build: Callable[[], nn.Module], digits: Digits, steps: int, seed: int) -> Outcome:
    outcome = Outcome(name)
    dense = _fresh(build, seed)
    _train(outcome, "dense", dense, digits, steps, seed)
    trained = {run: _train_sparse(outcome, run, build, digits, steps, seed) for run in ("masked", "compact")}
    outcome.masks = trained["compact"].masks()
    for batch in ROUNDS:
        outcome.latencies.append(_latency(dense, trained["compact"], digits.test_images[:batch]))
    return outcome


def _fresh(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The same initial weights for every run of a model."""
    torch.manual_seed(seed)
    return build()


def _train_sparse(
    outcome: Outcome, storage: str, build: Callable[[], nn.Module], digits: Digits, steps: int, seed: int
) -> SparseModule:
    method = rigl(every=20, stop=3 * steps // 4)
    plan = Plan(sparsity=SPARSITY, method=method, storage=storage, seed=seed)
    sparse = fxsparse.compile(_fresh(build, seed), plan, example_inputs=(digits.train_images[:64],))
    sparse.track_itop()
    outcome.reports[storage] = sparse.report
    _train(outcome, storage, sparse, digits, steps, seed)
    return sparse


def _train(outcome: Outcome, run: str, model: nn.Module, digits: Digits, steps: int, seed: int) -> None:
    settings: dict[str, Any] = {"rate": DENSE_RATE}
    if isinstance(model, SparseModule):
        settings = {"rate": SPARSE_RATE, "attach": model.attach}
    start = time.perf_counter()
    train(model, digits.draw, steps=steps, seed=seed, title=f"{outcome.name} {run}", **settings)
    outcome.seconds[run] = time.perf_counter() - start
    outcome.accuracy[run] = accuracy(model, digits)


@torch.no_grad()
def _latency(dense: nn.Module, sparse: SparseModule, images: Tensor) -> Latency:
    """Eager against eager: the dense model, and the sparse one compiled for this batch."""
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=(images,)).eval()
    dense.eval()
    calls = {"dense": lambda: dense(images), "sparse": lambda: fast(images)}
    medians = interleaved_medians(calls, rounds=ROUNDS[len(images)])
    return Latency(len(images), medians["dense"], medians["sparse"], fast.report)


def _print_reports(outcome: Outcome) -> None:
    """Passes and layers; the page has the rest too."""
    for name, report in outcome.named_reports().items():
        print(f"\n=== {name}")
        for title, headers, rows in report.tables():
            if title in PRINTED:
                _print((title, headers, rows))


def _print(table: Table) -> None:
    title, headers, rows = table
    print(f"\n{title}\n{tabulate(rows, headers, disable_numparse=True)}")
