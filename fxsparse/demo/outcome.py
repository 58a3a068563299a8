"""What the demo found out about one model, and the tables made of it."""

from dataclasses import dataclass, field

from torch import Tensor

from fxsparse.report import Report

Table = tuple[str, list[str], list[list[str]]]
"""Title, headers, cells: the form of `Report.tables`."""


@dataclass
class Latency:
    """Median microseconds of one forward in eval mode, dense and sparse in turns."""

    batch: int
    dense_us: float
    sparse_us: float
    report: Report
    """Of the inference compile: the kernel of every layer, with its own times."""

    @property
    def speedup(self) -> float:
        """Dense over sparse: above 1 the sparse model is the faster one."""
        return self.dense_us / self.sparse_us


@dataclass
class Outcome:
    """One model: accuracies and training seconds by run ("dense", "masked", "compact"), and latencies."""

    name: str
    accuracy: dict[str, float] = field(default_factory=dict)
    """Percent of the test images."""
    seconds: dict[str, float] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)
    latencies: list[Latency] = field(default_factory=list)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def named_reports(self) -> dict[str, Report]:
        """{what was compiled: its report}."""
        trained = {f"{self.name}, trained {run}": report for run, report in self.reports.items()}
        return trained | {f"{self.name}, inference at batch {t.batch}": t.report for t in self.latencies}


def tables(outcomes: list[Outcome]) -> list[Table]:
    """Accuracy and training, latency, and where sparse lost."""
    return [_training(outcomes), _latency(outcomes), _lost(outcomes)]


def _training(outcomes: list[Outcome]) -> Table:
    headers = ["model", "run", "zeros", "test accuracy (%)", "training (s)"]
    rows = [
        [o.name, run, f"{_zeros(o, run):.1%}", f"{percent:.1f}", f"{o.seconds[run]:.1f}"]
        for o in outcomes
        for run, percent in o.accuracy.items()
    ]
    return "Training: the same steps, dense and sparse from scratch", headers, rows


def _zeros(outcome: Outcome, run: str) -> float:
    """Share of zeros among the weights that the plan selected; a dense run has none."""
    return outcome.reports[run].totals["sparsity"] if run in outcome.reports else 0.0


def _latency(outcomes: list[Outcome]) -> Table:
    headers = ["model", "batch", "dense (us)", "sparse (us)", "speed-up"]
    rows = [
        [o.name, str(timed.batch), f"{timed.dense_us:.0f}", f"{timed.sparse_us:.0f}", f"{timed.speedup:.2f}x"]
        for o in outcomes
        for timed in o.latencies
    ]
    return "Inference: median of runs taken in turns", headers, rows


def _lost(outcomes: list[Outcome]) -> Table:
    rows = []
    for outcome in outcomes:
        for timed in outcome.latencies:
            where = [outcome.name, str(timed.batch)]
            if timed.speedup < 1:
                rows.append([*where, "the whole model", f"{timed.speedup:.2f}x of dense"])
            layers = (
                row for row in timed.report.layers if row["storage"] == "dense" and row["nnz"] < row["numel"]
            )
            rows += [[*where, row["name"], row["reason"]] for row in layers]
    if not rows:
        rows = [["none", "", "", "every sparse layer and model measured faster"]]
    return "Where sparse lost, and dense was kept", ["model", "batch", "where", "reason"], rows
