"""Linear layers whose weights are N:M: their kernel beside those for any zeros, and dense ones.

``python -m benchmarks.nm_linear [--dtype bfloat16] [--threads 1]``: 768 -> 3,072 and back, 2:4, 1:4 and 1:8.
Least milliseconds, how many times faster than ``F.linear`` (medians), and the least that the nonzeros can take here.
"""

import itertools

import torch
from tabulate import tabulate

from benchmarks.block_linear import headers, row
from benchmarks.timing import arguments, environment
from fxsparse.pattern import NM

SHAPES, GROUPS, BATCHES = ((3072, 768), (768, 3072)), ((2, 4), (1, 4), (1, 8)), (1, 8, 16, 64, 256)
KERNELS = ("cpu-nm", "cpu-lookup", "cpu-striped", "cpu-condensed", "onednn")


def main() -> None:
    """Read the options, measure and print."""
    options = arguments(__doc__ or "", rounds=25)
    dtype = getattr(torch, options.dtype)
    rows = []
    for (out, width), (n, m), batch in itertools.product(SHAPES, GROUPS, BATCHES):
        weight = torch.randn(out, width)
        weight = (weight * NM(n, m).project(weight.abs(), 0)).to(dtype)
        x = torch.randn(batch, width).to(dtype)
        rows.append([f"{width} -> {out}", f"{n}:{m}", *row(weight, x, KERNELS, options.rounds)])
    print(environment(dtype))
    print(tabulate(rows, ["layer", "zeros", *headers(KERNELS)], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
