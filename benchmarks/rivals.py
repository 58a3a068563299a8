"""Everything that can run one pruned model, as calls without arguments, for benchmarks.inference."""

import ctypes
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from benchmarks import engines
from benchmarks.footprint import resident
from fxsparse import SparseModule
from fxsparse.kernels import cpu

Call = Callable[[], Tensor]
DEEPSPARSE = "DeepSparse"
ONNX_RUNTIME = "ONNX Runtime"
CSR = "MKL CSR"
TORCH = ("eager", "ours", "compiled", "ours compiled")


@dataclass
class Rivals:
    """Calls by name, of which DeepSparse answers by its own clock, and what it cost to make them."""

    calls: dict[str, Call]
    ours: SparseModule
    deepsparse: engines.DeepSparse | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Of making each call, its first run included."""


@contextmanager
def rivals(pruned: nn.Module, x: Tensor, names: tuple[str, ...], python: str | None) -> Iterator[Rivals]:
    """All of `names` on `pruned` and `x`, warm; run them under ``torch.no_grad()``.

    `python` has DeepSparse; CSR is for a single linear layer alone.
    """
    torch._dynamo.reset()
    began = time.perf_counter()
    ours = fxsparse.compile(pruned, mode="infer", example_inputs=x)
    made = Rivals({}, ours, seconds={"ours": time.perf_counter() - began})
    for name in (*TORCH, CSR):
        if name in names:
            _add(made, name, lambda name=name: _torch_call(name, pruned, ours, x))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        if {ONNX_RUNTIME, DEEPSPARSE} & set(names):
            engines.export(pruned, x, path)
        if ONNX_RUNTIME in names:
            _add(made, ONNX_RUNTIME, lambda: engines.onnx_runtime(path, x, torch.get_num_threads()))
        if DEEPSPARSE in names and python is not None:
            made.deepsparse = engines.DeepSparse(python, path, x, torch.get_num_threads())
            made.seconds[DEEPSPARSE] = made.deepsparse.load_seconds
    try:
        yield made
    finally:
        if made.deepsparse is not None:
            made.deepsparse.close()


def errors(made: Rivals) -> dict[str, float]:
    """Largest difference of each output from the eager one, of the largest entry of that."""
    want = made.calls["eager"]()
    found = {name: call() for name, call in made.calls.items() if name != "eager"}
    if made.deepsparse is not None:
        found[DEEPSPARSE] = made.deepsparse.output
    scale = want.abs().max()
    return {name: float((got - want).abs().max() / scale) for name, got in found.items()}


def _add(made: Rivals, name: str, make: Callable[[], Call]) -> None:
    began = time.perf_counter()
    call = make()
    call()
    made.calls[name] = call
    made.seconds[name] = made.seconds.get(name, 0.0) + time.perf_counter() - began


def _torch_call(name: str, pruned: nn.Module, ours: SparseModule, x: Tensor) -> Call:
    if name == CSR:
        assert isinstance(pruned, nn.Linear), "CSR is for a linear layer"
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        weight, bias = pruned.weight.detach().to_sparse_csr(), pruned.bias
        return lambda: F.linear(x, weight, bias)
    module = ours if name.startswith("ours") else pruned
    if name.endswith("compiled"):
        module = torch.compile(module, dynamic=False)
    return lambda: module(x)


def memory(made: Rivals) -> dict[str, int]:
    """{call: bytes} by which a run raised the resident memory of this process, at its peak; torch's calls alone."""
    return {name: _peak(call) for name, call in made.calls.items() if name in TORCH}


def _peak(call: Call) -> int:
    cpu.release_memory()  # or what earlier calls freed would hide what this one takes
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)
