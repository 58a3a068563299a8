"""Train, save, load and serve a network whose dense weights would not fit: three layers of 131,072 at 99.9 % zeros.

``python -m benchmarks.always_sparse``: builds it from meta into compact storage, trains with Adam, lets GSE move the
nonzeros, saves everything, loads it into a new module that goes on with the same loss, compiles that for inference, and
prints times and memory.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fxsparse
from benchmarks.footprint import AllocatedBytes, network, resident
from fxsparse import Plan, SparseModule
from fxsparse.machine import processor
from fxsparse.methods import gse

EVERY = 3
"""The third step after the first updates the masks."""


def run(width: int, sparsity: float, tokens: int, folder: Path) -> dict[str, float | int]:
    """Seconds of each part, bytes of the file, of the largest tensor that any op returned, and of memory at its peak.

    Raises:
        ValueError: the loaded network does not go on with the loss of the one that was saved.
    """
    found: dict[str, float | int] = {}
    file = folder / "always-sparse.safetensors"
    with AllocatedBytes() as counted:
        with _timed("build", found):
            sparse, optimizer = _built(width, sparsity)
        found["nonzeros"] = sum(p.numel() for name, p in sparse.named_parameters() if name.endswith("values"))
        for number in range(EVERY + 2):
            with _timed("update step" if number == EVERY else "step", found):
                _step(sparse, optimizer, width, tokens, number)
        with _timed("save", found):
            fxsparse.save(sparse, file, optimizer=optimizer)
        expected = _step(sparse, optimizer, width, tokens, EVERY + 2)
        del sparse, optimizer
        with _timed("load", found):
            sparse, optimizer = _loaded(file, width)
        if (loss := _step(sparse, optimizer, width, tokens, EVERY + 2)) != expected:
            raise ValueError(f"expected the loss {expected} after loading, got {loss}")
        del optimizer
        found |= _served(sparse, torch.randn(tokens, width))
    found["file bytes"] = file.stat().st_size
    found["largest tensor, bytes"] = counted.largest
    found["peak memory, bytes"] = resident("VmHWM")
    found["dense weights, bytes"] = 3 * 4 * width * width
    return found


def _built(width: int, sparsity: float) -> tuple[SparseModule, torch.optim.Optimizer]:
    plan = Plan(
        sparsity=sparsity, method=gse(every=EVERY, stop=1000), allocation="er_unrolled", storage="compact"
    )
    sparse = fxsparse.compile(_empty(width), plan).train()
    optimizer = torch.optim.Adam(sparse.parameters())
    sparse.attach(optimizer)
    return sparse, optimizer


def _loaded(file: Path, width: int) -> tuple[SparseModule, torch.optim.Optimizer]:
    model = _empty(width)
    optimizer = torch.optim.Adam(model.parameters())
    return fxsparse.load(file, model, optimizer=optimizer).train(), optimizer


def _empty(width: int) -> nn.Module:
    with torch.device("meta"):
        return network("mlp", width)


def _served(sparse: SparseModule, x: Tensor) -> dict[str, float | int]:
    """Times of compiling for inference, of one forward of the result and of the training module in evaluation."""
    found: dict[str, float | int] = {}
    with _timed("compile for inference", found):
        fast = fxsparse.compile(sparse, mode="infer", example_inputs=x)
    sparse.eval()
    for _ in range(3):
        for name, model in (("inference", fast), ("the same, uncompiled", sparse)):
            with torch.no_grad(), _timed(name, found):
                model(x)
    return found


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, width: int, tokens: int, number: int) -> float:
    generator = torch.Generator().manual_seed(number)
    x, target = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.item()


@contextmanager
def _timed(name: str, found: dict[str, float | int]) -> Iterator[None]:
    """The least seconds of all blocks of this name, by the clock and of this process."""
    began = {"s": time.perf_counter(), "CPU s": time.process_time()}
    yield
    ended = {"s": time.perf_counter(), "CPU s": time.process_time()}
    for unit in began:
        seconds, key = round(ended[unit] - began[unit], 3), f"{name}, {unit}"
        found[key] = min(seconds, found.get(key, seconds))


def main() -> None:
    """Read the options, run, and print."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--width", type=int, default=131_072)
    options.add_argument("--sparsity", type=float, default=0.999)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--threads", type=int, default=1)
    words = options.parse_args()
    torch.set_num_threads(words.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = run(words.width, words.sparsity, words.tokens, Path(folder))
    print(f"{processor()}, {words.threads} thread(s), fp32, {words.tokens} tokens, torch {torch.__version__}")
    rows = [[name, f"{value:,}"] for name, value in found.items()]
    print(tabulate(rows, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
