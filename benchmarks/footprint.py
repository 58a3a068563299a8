"""What training steps of one model cost in time, memory and work; benchmarks.scaling runs it in a fresh process.

``python -m benchmarks.footprint '{"model": "mlp", "method": "gse", "width": 2048, "tokens": 128}'`` prints JSON.
Resident memory is read from /proc, so this runs on Linux alone.
"""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fxsparse
from benchmarks.models.transformer import Block
from fxsparse import Plan
from fxsparse.methods import gse, rigl

EPSILON = 20.48
"""Nonzeros of a layer for each of its inputs and outputs (Erdos-Renyi): 99 % zeros at 4,096 x 4,096."""
EVERY = 3
"""Every third step updates masks."""
SECONDS = 8.0
"""No new cycle of steps begins later than this."""


class AllocatedBytes(TorchDispatchMode):
    """Adds up what the ops inside the block allocate for their results; views and in-place ops allocate nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _has_memory(tensor) and _storage(tensor) not in known:
                size = tensor.untyped_storage().nbytes()
                known.add(_storage(tensor))
                self.total += size
                self.largest = max(self.largest, size)
        return result


def _has_memory(tensor: Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def network(model: str, width: int) -> nn.Module:
    """Three square layers with ReLU between them, or a transformer block of `width` with heads of 64."""
    if model == "vit":
        return Block(width, width // 64, 64, 4 * width)
    layers = [nn.Linear(width, width) for _ in range(3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def trained(settings: Mapping[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model of a cell and its Adam: dense, RigL in masked storage, or GSE from meta to compact storage."""
    torch.manual_seed(0)
    model, method, width = settings["model"], settings["method"], settings["width"]
    if method == "dense":
        made: nn.Module = network(model, width)
    else:
        with torch.device("meta"):
            empty = network(model, width)
        plan = Plan(
            sparsity=1 - nonzeros(empty) / sum(w.numel() for w in _weights(empty)),
            method=gse(every=EVERY, stop=10**6) if method == "gse" else rigl(every=EVERY, stop=10**6),
            allocation="er_unrolled",
            storage="compact" if method == "gse" else "masked",
        )
        made = fxsparse.compile(empty, plan)
    optimizer = torch.optim.Adam(made.parameters())
    if isinstance(made, fxsparse.SparseModule):
        made.attach(optimizer)
    return made.train(), optimizer


def nonzeros(model: nn.Module) -> int:
    """What EPSILON gives all linear layers together."""
    return round(EPSILON * sum(sum(weight.shape) for weight in _weights(model)))


def measure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step and of one that updates masks (least, median, CPU), peak memory, and what is counted.

    Memory is the growth of this process above what it had after a cycle of a small model: bytes, at its peak.
    """
    torch.set_num_threads(settings.get("threads", 1))
    _cycle(_stepper(dict(settings) | {"width": 128}), [])  # loads what is loaded on first use
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    began = time.perf_counter()
    step = _stepper(settings)
    built = time.perf_counter() - began
    _cycle(step, [])
    stored = resident("VmRSS") - before
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < 2 * EVERY or (time.perf_counter() - began < SECONDS and len(times) < 8 * EVERY):
        _cycle(step, times)
    peak = resident("VmHWM") - before
    plain = [t for i, t in enumerate(times) if i % EVERY]
    updates = times[::EVERY]
    result = {"build_s": round(built, 3), "peak_bytes": peak, "kept_bytes": stored, "step": _summary(plain)}
    if settings["method"] != "dense":
        result["update"] = _summary(updates)
    return result | _counts(step, settings["method"] != "dense")


def _stepper(settings: Mapping[str, Any]) -> Callable[[], None]:
    model, optimizer = trained(settings)
    shape = (settings["tokens"], settings["width"])
    x, target = torch.randn(shape), torch.randn(shape)
    if settings["model"] == "vit":
        x, target = (t.unflatten(0, (-1, 64)) for t in (x, target))

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()

    return step


def _cycle(step: Callable[[], None], times: list[tuple[float, float]]) -> None:
    """EVERY steps, of which the first updates masks: (wall seconds, CPU seconds) of each."""
    for _ in range(EVERY):
        wall, used = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - wall, time.process_time() - used))


def _summary(times: list[tuple[float, float]]) -> dict[str, float]:
    wall, used = zip(*times, strict=True)
    named = {"least": min(wall), "median": statistics.median(wall), "cpu": statistics.median(used)}
    return {name: round(seconds, 6) for name, seconds in named.items()}


def _counts(step: Callable[[], None], updates: bool) -> dict[str, dict[str, int]]:
    """FLOPs, bytes allocated and the largest tensor, of a step and of one that updates masks."""
    found = {}
    for name in ("update", "step") if updates else ("step",):
        flops, counted = FlopCounterMode(display=False), AllocatedBytes()
        with flops, counted:
            step()
        found[f"{name}_counts"] = {
            "flops": flops.get_total_flops(),
            "bytes": counted.total,
            "largest_bytes": counted.largest,
        }
    return found


def _weights(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def resident(name: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at its peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "no /proc/self/status as Linux has it"
    return int(found[1]) * 1024


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
