"""How much arithmetic and reading the threads of this process can do at most, measured by loops in C++."""

from functools import partial

import torch

from fxsparse import machine
from fxsparse.kernels.cpu.build import load, version

_STEPS = 20_000
_BYTES = 1 << 21
"""At least so many are read in one measurement, beside which the call itself does not count."""


def flops_per_second() -> float:
    """Of multiply-adds that wait for nothing, in fp32 and the instruction set in use; 0 without the C++ kernels."""
    if not load():
        return 0.0
    run = torch.ops.fxsparse.cpu_multiply_adds.default
    return run(_STEPS) / machine.least_seconds(_key("multiply-adds", _STEPS), lambda: partial(run, _STEPS))


def bytes_per_second(size: int) -> float:
    """Of reading `size` bytes over and over, from the nearest cache that holds them; 0 without the C++ kernels."""
    if not load():
        return 0.0
    run, times = torch.ops.fxsparse.cpu_read.default, max(1, _BYTES // size)
    seconds = machine.least_seconds(_key("read", size), lambda: partial(run, torch.ones(size // 4), times))
    return size * times / seconds


def _key(name: str, size: int) -> tuple[object, ...]:
    return "roof", name, size, version(), torch.get_num_threads()
