"""Comparing run times on a machine that other work disturbs."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1, inner: int = 1
) -> dict[str, float]:
    """Median microseconds of each call; see `interleaved_samples`."""
    samples = interleaved_samples(calls, rounds=rounds, warm_up=warm_up, inner=dict.fromkeys(calls, inner))
    return {name: statistics.median(values) for name, values in samples.items()}


def interleaved_quartiles(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float
) -> dict[str, float]:
    """Microseconds that a quarter of each call's turns stay below: other work can only make a call slower.

    Turns end after `rounds`, or after five once they have taken `seconds`.  A call that takes more than twice as long
    as the fastest has two turns, where those took a tenth of `seconds`.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    began, left = time.perf_counter(), calls
    for turn in range(rounds):
        spent = time.perf_counter() - began
        if turn >= 5 and spent > seconds:
            break
        if turn == 2 and spent > seconds / 10:
            fastest = min(map(min, samples.values()))
            left = {name: call for name, call in calls.items() if min(samples[name]) <= 2 * fastest}
        taken = interleaved_samples(left, rounds=1, warm_up=0, inner=dict.fromkeys(left, 1))
        for name, values in taken.items():
            samples[name] += values
    return {name: sorted(values)[len(values) // 4] for name, values in samples.items()}


def interleaved_samples(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int, inner: Mapping[str, int]
) -> dict[str, list[float]]:
    """Microseconds of each call in each of `rounds` turns, after `warm_up` turns that do not count.

    The calls take turns, so that drift of the machine falls on all alike; a turn is ``inner[name]`` calls in a row.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner[name]):
                call()
            if turn >= warm_up:
                samples[name].append(1e6 * (time.perf_counter() - start) / inner[name])
    return samples
