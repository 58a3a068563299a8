"""Which of the few ways to launch a kernel is fastest: measured while kernels are chosen, and remembered on disk.

Ordinary calls never measure and never wait for the device: they take what was found for their sizes, else the first
way, which is right for most.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fxsparse import machine
from fxsparse.kernels.gpu.device import name_of, seconds

Launch = TypeVar("Launch")

SECONDS = 0.5
"""Of calls, after which no further one is made to find a launch: the search is bounded."""

_TURNS, _CALLS = 3, 5
_MEASURING: ContextVar[bool] = ContextVar("measuring", default=False)


class _Taken(NamedTuple):
    launch: Any
    is_measured: bool


_TAKEN: dict[tuple[object, ...], _Taken] = {}


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Let `fastest` measure: a block whose calls may wait for the device."""
    token = _MEASURING.set(True)
    try:
        yield
    finally:
        _MEASURING.reset(token)


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
    if found is None or (_MEASURING.get() and not found.is_measured):
        found = _TAKEN[key] = _found(key, launches(), run, device)
    return found.launch


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
    if not _MEASURING.get():
        return _Taken(launches[0], False)
    taken = _measured(launches, run, device)
    machine.remember(lasting, repr(taken))
    return _Taken(taken, True)


def _measured(launches: Sequence[Launch], run: Callable[[Launch], object], device: torch.device) -> Launch:
    """The launch with the least time of its turns."""
    least: dict[int, float] = {}
    spent = 0.0
    for _ in range(_TURNS):
        for place, launch in enumerate(launches):
            if spent > SECONDS:
                break
            taken = seconds(lambda launch=launch: run(launch), device, _CALLS)
            least[place] = min(taken, least.get(place, taken))
            spent += taken * (_CALLS + 1)
    return launches[min(least, key=least.__getitem__)]


@cache
def _version(kernel: str) -> str:
    """Of the kernel's source and of Triton: launches of other code say nothing."""
    from importlib.metadata import version
    from importlib.util import find_spec

    spec = find_spec(kernel)
    source = Path(spec.origin).read_bytes() if spec is not None and spec.origin else b""
    return f"{hashlib.sha256(source).hexdigest()[:16]} {version('triton')}"
