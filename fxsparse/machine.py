"""What this machine is, and what earlier processes measured on it, kept as files in the cache folder."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
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


@functools.cache
def sources_digest(module: str) -> str:
    """Of an imported module's source, and of those beside it in its package: times of other code say nothing."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return ""
    sources = sorted(Path(file).parent.glob("*.py")) if "." in module else [Path(file)]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def flops_per_second(dtype: torch.dtype) -> float:
    """What torch's dense matrix product reaches on the threads of this process."""
    key = ("roof", "product", 512, str(dtype), torch.get_num_threads())
    return 2 * 512**3 / least_seconds(key, lambda: _product(512, 512, dtype=dtype))


def bytes_per_second(size: int) -> float:
    """What torch's dot product reaches over `size` bytes, which the nearest cache that can hold them does hold."""
    key = ("roof", "dot", size, torch.get_num_threads())
    return size / least_seconds(key, lambda: _product(size // 8, dtype=torch.float32))


def least_seconds(
    key: object,
    prepare: Callable[[], Callable[[], object]],
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> float:
    """Seconds of the call that `prepare` makes, the least of 20; measured once on each machine, then remembered.

    `clock` gives the seconds of one call; by default those of the processor.
    """
    clock = clock or _seconds
    if key not in _SECONDS:
        found = recall(key)
        if found is None:
            call = prepare()
            found = min(clock(call) for _ in range(20))
            remember(key, found)
        _SECONDS[key] = found
    return _SECONDS[key]


_SECONDS: dict[object, float] = {}


def _product(*shape: int, dtype: torch.dtype) -> Callable[[], object]:
    one, other = torch.ones(2, *shape, dtype=dtype)
    return lambda: torch.matmul(one, other)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _stamped(key: object) -> tuple[object, ...]:
    return processor(), torch.__version__, key


def _file(key: object) -> Path:
    name = hashlib.sha256(repr(_stamped(key)).encode()).hexdigest()[:24]
    return measured_folder() / f"{name}.json"
