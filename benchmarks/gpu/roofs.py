"""What a device's memory and caches deliver, measured here with torch's own kernels."""

import functools
import math
import shutil
import subprocess

import torch
from torch import Tensor

from benchmarks.gpu.clock import Ready, times
from benchmarks.gpu.rivals import normal

_LARGE, _SMALL = 1 << 30, 1 << 24
"""Bytes of what lies in memory, and of what lies in the L2 cache."""
_MOST = 64
"""Copies; fewer bytes than that only where a weight is tiny."""


@functools.cache
def bytes_per_second(device: torch.device) -> dict[str, float]:
    """{"DRAM", "L2", on a GPU "L1"}.

    DRAM is the faster of a copy (bytes read and written) and a sum over 1 GiB; L2 a sum over the same 16 MiB again and
    again; L1 is not measured but 128 bytes for each multiprocessor and cycle at the highest clock.
    """
    large, small = (_LARGE, _SMALL) if device.type == "cuda" else (1 << 16, 1 << 14)
    one = normal(torch.Generator(device).manual_seed(0), large // 4)
    other, many = torch.empty_like(one), one[: small // 4].expand(32, -1)

    def copy() -> Tensor:
        return other.copy_(one)

    calls = {"copy": copy, "sum": one.sum, "L2": lambda: many.sum(1)}
    found = times({name: Ready([call]) for name, call in calls.items()}, device, 0.3).us
    dram = max(2 * large / found["copy"][2], large / found["sum"][2])
    made = {"DRAM": dram, "L2": many.numel() * 4 / found["L2"][2]}
    if (clock := _highest_clock(device)) is not None:
        made["L1"] = torch.cuda.get_device_properties(device).multi_processor_count * 128 * clock / 1e6
    return {name: 1e6 * rate for name, rate in made.items()}


def copies(weight_bytes: int, device: torch.device) -> int:
    """How many copies of a weight take four times the L2, so that each comes from memory; at most 64."""
    if device.type != "cuda":
        return 2
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST, math.ceil(4 * size / weight_bytes))


def _highest_clock(device: torch.device) -> float | None:
    """Cycles per second of the multiprocessors, as the driver's tool says; None without it."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return 1e6 * float(words[0]) if done.returncode == 0 and words and words[0].isdigit() else None
