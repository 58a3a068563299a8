"""Which of the few ways to launch a kernel is fastest: measured while kernels are chosen, and remembered on disk.

Ordinary calls never measure and never wait for the device: they take what was found for their sizes, else the first
way, which is right for most.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar

import torch

from fxsparse import machine
from fxsparse.kernels.gpu.device import name_of, seconds
from fxsparse.kernels.gpu.needs import failures

Launch = TypeVar("Launch")

SECONDS = 0.5
"""Of calls, after which no further one is made to find a launch: the search is bounded."""

LIBRARY = "fxsparse.kernels.library"
"""What kernels of all folders share lies beside it, and beside this file."""

_TURNS, _CALLS = 3, 5
_measurers = 0
"""Blocks of `measuring` that are open, in any thread: autograd runs gradients in threads of its own."""


class _Taken(NamedTuple):
    launch: Any
    is_measured: bool


_TAKEN: dict[tuple[object, ...], _Taken] = {}


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Let `fastest` measure: a block whose calls may wait for the device."""
    global _measurers
    _measurers += 1
    try:
        yield
    finally:
        _measurers -= 1


def fastest(
    kernel: str,
    sizes: tuple[object, ...],
    launches: Callable[[], Sequence[Launch]],
    run: Callable[[Launch], object],
    device: torch.device,
) -> Launch:
    """The one of `launches` that was fastest for a `kernel` (a module's name) at these sizes, dtypes among them.

    The first where nothing was measured, here or by an earlier process with this code and device, and nothing may be.
    """
    key = (kernel, sizes, device)
    found = _TAKEN.get(key)
    if found is None or (_may_measure(device) and not found.is_measured):
        found = _TAKEN[key] = _found(key, launches(), run, device)
    return found.launch


def _may_measure(device: torch.device) -> bool:
    """Not while this thread captures a CUDA graph, whoever else measures."""
    return _measurers > 0 and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _found(
    key: tuple[object, ...], launches: Sequence[Launch], run: Callable[[Launch], object], device: torch.device
) -> _Taken:
    if len(launches) == 1:
        return _Taken(launches[0], True)
    kernel, sizes, _ = key
    lasting = ("launch", kernel, sizes, name_of(device), _version(str(kernel)))
    known = machine.recall(lasting)
    for launch in launches:
        if repr(launch) == known:
            return _Taken(launch, True)
    if not _may_measure(device):
        return _Taken(launches[0], False)
    taken = _measured(launches, run, device)
    machine.remember(lasting, repr(taken))
    return _Taken(taken, True)


def _measured(launches: Sequence[Launch], run: Callable[[Launch], object], device: torch.device) -> Launch:
    """The launch with the least time of its turns."""
    least: dict[int, float] = {}
    failed: Exception | None = None
    spent = 0.0
    for _ in range(_TURNS):
        for place, launch in enumerate(launches):
            if spent > SECONDS:
                break
            try:
                taken = seconds(lambda launch=launch: run(launch), device, _CALLS)
            except failures() as error:  # others may do: this GPU has less memory, say, than the launch takes
                failed = error
                continue
            least[place] = min(taken, least.get(place, taken))
            spent += taken * (_CALLS + 1)
    if failed is not None and not least:
        raise failed
    return launches[min(least, key=least.__getitem__)]


@cache
def _version(kernel: str) -> str:
    """Of Triton and of the sources beside the kernel's: launches of other code say nothing."""
    return " ".join([*map(machine.sources_digest, (kernel, __name__, LIBRARY)), version("triton")])
