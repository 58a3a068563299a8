"""Comparing run times on a machine that other work disturbs."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 3
) -> dict[str, float]:
    """Median microseconds of each call over `rounds` turns.

    In a turn every call runs once, so that drift falls on all alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                samples[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}
