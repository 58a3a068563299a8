"""The kernels of compact training one by one: bfloat16 against fp32, and two threads against one.

    python -m benchmarks.training_kernels [--rounds 25]

Forward, gradient of the input, gradient of the stored weights, and a move of 30 % of them.  All four combinations take
turns in one process, and the least time of each counts; a move handles no values, so it has no dtype.
"""

import argparse
from collections.abc import Callable

import torch
from tabulate import tabulate

from fxsparse.formats import csr
from fxsparse.formats.csr import CsrIndex
from fxsparse.kernels import cpu
from fxsparse.machine import processor
from fxsparse.selection import MaskChange, random_positions
from fxsparse.timing import interleaved_samples

LAYERS = ((768, 3072, 512, 0.9), (3072, 768, 512, 0.9), (768, 3072, 512, 0.99), (4096, 4096, 128, 0.99))
"""(in, out, tokens, sparsity)."""
THREADS = (1, 2)
DTYPES = (torch.float32, torch.bfloat16)
Calls = dict[str, Callable[[], object]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="samples per number; the least counts")
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    cpu.load()
    rows = [row for layer in LAYERS for row in layer_rows(*layer, rounds)]
    torch.set_num_threads(1)
    print(
        f"Least of {rounds} interleaved runs. {processor()}; torch {torch.__version__}; "
        f"kernels: {cpu.instruction_set()}"
    )
    headers = ["in", "out", "tokens", "sparsity %", "kernel", "fp32 ms", "bf16 / fp32"]
    print(tabulate(rows, [*headers, "2 threads / 1, fp32", "bf16"], tablefmt="github", floatfmt=".2f"))


def layer_rows(inputs: int, outputs: int, tokens: int, sparsity: float, rounds: int) -> list[list[object]]:
    """One line for each kernel on one layer."""
    generator = torch.Generator().manual_seed(0)
    numel = inputs * outputs
    flat = random_positions(round(numel * (1 - sparsity)), numel, generator)
    index = csr.from_flat(flat, (outputs, inputs))
    kernels = {dtype: products(index, tokens, dtype) for dtype in DTYPES}
    kernels[torch.float32] |= {"move": move(index, flat, generator)}
    calls = {
        f"{name}/{dtype}/{threads}": on_threads(threads, call)
        for dtype, named in kernels.items()
        for name, call in named.items()
        for threads in THREADS
    }
    samples = interleaved_samples(calls, rounds=rounds, warm_up=1, inner=dict.fromkeys(calls, 1))
    least = {name: min(times) for name, times in samples.items()}

    def ratio(name: str, of: str, to: str) -> float | None:
        return least[f"{name}/{of}"] / least[f"{name}/{to}"] if f"{name}/{of}" in least else None

    fp32, bf16 = map(str, DTYPES)
    return [
        [
            *(inputs, outputs, tokens, round(100 * sparsity), name, least[f"{name}/{fp32}/1"] / 1e3),
            ratio(name, f"{bf16}/1", f"{fp32}/1"),
            ratio(name, f"{fp32}/2", f"{fp32}/1"),
            ratio(name, f"{bf16}/2", f"{bf16}/1"),
        ]
        for name in kernels[torch.float32]
    ]


def products(index: CsrIndex, tokens: int, dtype: torch.dtype) -> Calls:
    """The three products of a training step."""
    outputs, inputs = index.shape
    values, x, grad = (
        torch.randn(n).to(dtype) for n in (index.capacity, (tokens, inputs), (tokens, outputs))
    )
    transposed = (index.crow, index.cols, index.ccol, index.rows_t, index.perm)
    forward, backward = torch.ops.fxsparse.csr_forward, torch.ops.fxsparse.csr_backward
    return {
        "forward": lambda: forward(x, values, index.crow, index.cols, inputs, None, 0),
        "input gradient": lambda: backward(grad, x, values, *transposed, True, False, False),
        "weight gradient": lambda: backward(grad, x, values, *transposed, False, True, False),
    }


def move(index: CsrIndex, flat: torch.Tensor, generator: torch.Generator) -> Callable[[], object]:
    """A topology update once its entries are chosen: what changes, and the index of what comes out, on a copy."""
    numel, gone = index.shape[0] * index.shape[1], round(0.3 * len(flat))
    kept = flat[torch.randperm(len(flat), generator=generator)[gone:]].sort().values
    new = torch.cat([kept, random_positions(gone, numel, generator, taken=kept)]).sort().values
    copied = csr.from_flat(flat, index.shape)

    def moved() -> None:
        csr.move_(copied, MaskChange.between(flat, new).new)

    return moved


def on_threads(threads: int, call: Callable[[], object]) -> Callable[[], object]:
    """The call with so many threads."""

    def run() -> object:
        torch.set_num_threads(threads)
        return call()

    return run


if __name__ == "__main__":
    main()
