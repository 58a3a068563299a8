"""Inference of one linear layer: F.linear, oneDNN's dense product, torch's CSR and our kernels.

    python -m benchmarks.batch_one [--threads 1] [--rounds 101] [--dtype float32]

The weight has constant fan-in, so that every format can hold it.  A sample is 20 calls in a row, as a server that
does nothing else would make them; samples take turns.
"""

import warnings

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks.timing import arguments, environment, ratio
from fxsparse.kernel import registered
from fxsparse.timing import interleaved_medians

LAYERS = ((768, 3072), (3072, 768))
"""(in, out)."""
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)
BATCHES = (1, 8, 64, 512)
KERNELS = ("cpu-csr", "cpu-condensed", "cpu-lookup", "cpu-striped")
_INNER = 20


def main() -> None:
    """Print the table."""
    options = arguments(__doc__ or "", 101)
    dtype = getattr(torch, options.dtype)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
    rows = [
        row(*layer, sparsity, batch, dtype, options.rounds)
        for batch in BATCHES
        for layer in LAYERS
        for sparsity in (SPARSITIES if batch == 1 else (0.9,))
    ]
    headers = ["batch", "in", "out", "sparsity %", "F.linear us", "oneDNN us", "torch CSR us"]
    headers += [f"{name.removeprefix('cpu-')} us" for name in KERNELS]
    headers += ["best against F.linear", "against oneDNN", "against torch CSR"]
    print(f"Median of {options.rounds} interleaved samples of {_INNER} calls. {environment(dtype)}")
    print(tabulate(rows, headers, disable_numparse=True))


def row(
    in_features: int, out_features: int, sparsity: float, batch: int, dtype: torch.dtype, rounds: int
) -> list[str]:
    """One line of the table."""
    fan_in = round(in_features * (1 - sparsity))
    columns = torch.rand(out_features, in_features).topk(fan_in, 1).indices
    weight = torch.zeros(out_features, in_features).scatter_(1, columns, torch.randn(out_features, fan_in))
    weight, bias = weight.to(dtype), torch.randn(out_features, dtype=dtype)
    x = torch.randn(batch, in_features, dtype=dtype)
    calls = {"dense": lambda: F.linear(x, weight, bias)}
    if dtype == torch.float32:  # torch's CSR has no bfloat16
        theirs = weight.to_sparse_csr()
        calls["torch"] = lambda: F.linear(x, theirs, bias)
    for name in ("onednn", *KERNELS):
        calls[name] = kernel_call(name, x, weight, bias)
    with torch.no_grad():
        inner = _INNER if batch < 64 else 1
        times = interleaved_medians(calls, rounds=rounds if batch < 512 else min(rounds, 25), inner=inner)
    best = min(times[name] for name in KERNELS)
    return [
        *(str(number) for number in (batch, in_features, out_features)),
        f"{100 * sparsity:.0f}",
        *(f"{times[name]:.1f}" if name in times else "-" for name in ("dense", "onednn", "torch", *KERNELS)),
        ratio(times["dense"], best),
        ratio(times["onednn"], best),
        ratio(times["torch"], best) if "torch" in times else "-",
    ]


def kernel_call(name: str, x: Tensor, weight: Tensor, bias: Tensor):
    """A call of the registered kernel `name`."""
    kernel = registered()[name]
    buffers = list(kernel.pack(weight).values())
    return lambda: kernel.run(x, bias, *buffers, in_features=weight.shape[1])


if __name__ == "__main__":
    main()
