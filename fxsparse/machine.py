"""What this machine is, and what earlier processes measured on it, kept as files in the cache folder."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def cache_folder() -> Path:
    """FXSPARSE_CACHE, else ``fxsparse`` in the user's cache folder."""
    if folder := os.environ.get("FXSPARSE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxsparse"


def measured_folder() -> Path:
    """Where `remember` keeps things; remove it and everything is measured again."""
    return cache_folder() / "measured"


@functools.cache
def processor() -> str:
    """The name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text().splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )


def recall(key: object) -> Any:
    """What `remember` kept under this key, by its repr, here and on this machine; None if there is nothing."""
    try:
        kept = json.loads(_file(key).read_text())
    except (
        OSError,
        ValueError,
    ):  # nothing there, or half a disk of it: what can be measured again is no loss
        return None
    return kept["value"] if isinstance(kept, dict) and kept.get("key") == repr(_stamped(key)) else None


def remember(key: object, value: Any) -> None:
    """Keep a JSON value for later processes; where the cache folder cannot be written, they measure again."""
    file = _file(key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            whole = Path(folder, file.name)
            whole.write_text(json.dumps({"key": repr(_stamped(key)), "value": value}))
            os.replace(whole, file)


def limit_us(flops: int, bytes_read: int, dtype: torch.dtype) -> float:
    """Microseconds below which no CPU kernel can come that does so much on the threads of this process.

    The roofs are measured once on each machine: a dense matrix product of torch, and its dot product of so many bytes.
    """
    return 1e6 * max(flops / _flops_per_second(dtype), bytes_read / _bytes_per_second(bytes_read))


def _flops_per_second(dtype: torch.dtype) -> float:
    return 2 * 512**3 / _roof("flops", 512, dtype, torch.get_num_threads())


def _bytes_per_second(bytes_read: int) -> float:
    """From the cache that holds so much, or from memory: sizes are powers of two from 256 KiB to 128 MiB."""
    size = 1 << min(27, max(18, (bytes_read - 1).bit_length()))
    return size / _roof("bytes", size, torch.float32, torch.get_num_threads())


@functools.cache
def _roof(name: str, size: int, dtype: torch.dtype, threads: int) -> float:
    """Seconds of a product of two [size, size], or of reading `size` bytes: the least of 20."""
    key = ("roof", name, size, str(dtype), threads)
    seconds = recall(key)
    if seconds is None:
        shape = (2, size, size) if name == "flops" else (2, size // 2 // dtype.itemsize)
        one, other = torch.ones(shape, dtype=dtype)
        seconds = min(_seconds(one, other) for _ in range(20))
        remember(key, seconds)
    return seconds


def _seconds(one: torch.Tensor, other: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.matmul(one, other)
    return time.perf_counter() - start


def _stamped(key: object) -> tuple[object, ...]:
    return processor(), torch.__version__, key


def _file(key: object) -> Path:
    name = hashlib.sha256(repr(_stamped(key)).encode()).hexdigest()[:24]
    return measured_folder() / f"{name}.json"
