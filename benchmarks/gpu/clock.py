"""Times of calls that take turns, on a GPU by its events, on the CPU by the clock.

On a GPU everything is timed twice: as the replay of a CUDA graph, which is the kernels alone, and as calls from Python,
which for small work is the launching.  A sample is several calls in a row with the same work queued before it, so that
the GPU never waits for the host between the two events.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from subprocess import SubprocessError

import torch
from torch import Tensor

from fxsparse.timing import interleaved_samples

Call = Callable[[], Tensor | Sequence[Tensor]]
Spread = list[float]
"""Microseconds of a call: least, lower quartile, median, upper quartile."""
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError, LookupError)
FAILURES += (ArithmeticError, OSError, SubprocessError)
"""What is caught of rivals that are not available: torch's own errors are RuntimeErrors; compilers are processes."""
SAMPLE_US, CAPTURED, ROUNDS = 1000, 64, (7, 51)
"""The least that a sample takes, the most calls in a graph, the fewest and most samples."""


@dataclass(frozen=True)
class Ready:
    """Calls that compute the same, each from its own copy of the weight, and whether fp32 products may be TF32."""

    calls: Sequence[Call]
    tf32: bool = False

    def run(self) -> None:
        """Make every call once."""
        for call in self.calls:
            call()


@dataclass(frozen=True)
class Times:
    """By name."""

    us: dict[str, Spread]
    """As a graph; on the CPU as calls."""
    calls_us: dict[str, Spread]
    uncaptured: dict[str, str]
    """Why there is no graph of it."""


def times(ready: Mapping[str, Ready], device: torch.device, seconds: float = 1.0) -> Times:
    """Of every call in `ready`, in turns, for about as many `seconds` in each of the two ways."""
    if device.type != "cuda":
        runs = {name: each.run for name, each in ready.items()}
        samples = interleaved_samples(runs, rounds=ROUNDS[0], warm_up=1, inner=dict.fromkeys(runs, 1))
        spreads = {name: spread([us / len(ready[name].calls) for us in s]) for name, s in samples.items()}
        return Times(spreads, spreads, {})
    graphs: dict[str, Ready] = {}
    uncaptured: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name, each in ready.items():
        try:
            graphs[name], counts[name] = _captured(each)
        except FAILURES as error:
            uncaptured[name] = reason(error)
            torch.cuda.synchronize()  # a broken device ends the run here
    replayed = _spreads(graphs, counts, seconds)
    calls = _spreads(ready, {name: len(each.calls) for name, each in ready.items()}, seconds)
    return Times(replayed, calls, uncaptured)


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Let fp32 products on GPUs be TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def reason(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def spread(values: Sequence[float]) -> Spread:
    """Of at least two samples."""
    return [round(value, 3) for value in (min(values), *statistics.quantiles(values, n=4))]


def _captured(ready: Ready) -> tuple[Ready, int]:
    """The calls as one graph, repeated until it takes a while, and how many calls that are."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with precision(ready.tf32), torch.cuda.stream(stream):
        for _ in range(3):
            ready.run()
        repeats = math.ceil(min(CAPTURED / len(ready.calls), SAMPLE_US / _turn_us(ready.run, 1)))
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(repeats):
                ready.run()
    torch.cuda.synchronize()

    def replay() -> tuple[()]:
        graph.replay()
        return ()

    return Ready([replay], ready.tf32), repeats * len(ready.calls)


def _spreads(ready: Mapping[str, Ready], counts: Mapping[str, int], seconds: float) -> dict[str, Spread]:
    """Of one call, of which `run` makes so many."""
    turns: dict[str, int] = {}
    one = 0.0
    for name, each in ready.items():
        with precision(each.tf32):
            each.run()
            us = _turn_us(each.run, 1)
            turns[name] = math.ceil(SAMPLE_US / us)
        one += 2 * us * turns[name] / 1e6
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(one, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, each in ready.items():
            with precision(each.tf32):
                samples[name].append(_turn_us(each.run, turns[name]) / counts[name])
    return {name: spread(values) for name, values in samples.items()}


def _turn_us(run: Callable[[], None], turns: int) -> float:
    """Microseconds of one of so many `turns` in a row, after as many that keep the device busy meanwhile."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(turns):
        run()
    start.record()
    for _ in range(turns):
        run()
    end.record()
    end.synchronize()
    return max(1e3 * start.elapsed_time(end) / turns, 1e-3)
