"""Linear layers whose weights are strided 1:M, beside the best kernel for a constant fan-in of the same sparsity.

``python -m benchmarks.strided_linear [--dtype bfloat16] [--threads 1]``: M of 4, 8 and 16 (75, 87.5 and 93.75 % zeros),
batch 1 and 64.  Least milliseconds; ratios are of medians.  Kernels for the columns of a constant fan-in, which lie
anywhere in a row, take strided weights too; each has the fastest kernel, as inference chooses it.  N:M is 1:M with
neighbours as groups, whose kernel is the same, without sorting inputs.
"""

import itertools

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks.timing import arguments, environment, ratio
from fxsparse.kernel import registered
from fxsparse.pattern import NM, ConstantFanIn, Strided
from fxsparse.timing import interleaved_samples

SHAPES, STRIDES, BATCHES = ((3072, 768), (768, 3072), (4096, 4096)), (4, 8, 16), (1, 64)
ANY_COLUMNS = ("cpu-lookup", "cpu-striped", "cpu-condensed", "cpu-csr")
HEADERS = (
    "layer",
    "zeros",
    "batch",
    "F.linear (ms)",
    "strided (ms)",
    "its kernel",
    "cpu-strided (ms)",
    "constant fan-in (ms)",
    "its kernel",
)
HEADERS += ("N:M (ms)", "to F.linear", "to constant fan-in")


def main() -> None:
    """Read the options, measure and print."""
    options = arguments(__doc__ or "", rounds=25)
    dtype = getattr(torch, options.dtype)
    rows = []
    for (out, width), m, batch in itertools.product(SHAPES, STRIDES, BATCHES):
        weight, x = torch.randn(out, width).to(dtype), torch.randn(batch, width).to(dtype)
        rows.append([f"{width} -> {out}", f"1:{m}", str(batch), *row(weight, x, m, options.rounds)])
    print(environment(dtype))
    print(tabulate(rows, HEADERS, tablefmt="github", disable_numparse=True))


@torch.no_grad()
def row(weight: Tensor, x: Tensor, m: int, rounds: int) -> list[str]:
    """What the columns behind the batch say."""
    score = weight.abs().float()
    fan_in, strided = ConstantFanIn().project(score, weight.numel() // m), Strided(m).project(score, 0)
    runs = {f"{name}, fan-in": (name, fan_in) for name in ANY_COLUMNS}
    runs |= {f"{name}, strided": (name, strided) for name in ("cpu-strided", *ANY_COLUMNS)}
    runs["N:M"] = ("cpu-nm", NM(1, m).project(score, 0))
    calls = {"F.linear": lambda: F.linear(x, weight)}
    for run, (name, mask) in runs.items():
        entry = registered()[name]
        packed = tuple(entry.pack(weight * mask).values())
        calls[run] = lambda entry=entry, packed=packed: entry.run(
            x, None, *packed, in_features=weight.shape[1]
        )
    samples = interleaved_samples(calls, rounds=rounds, warm_up=2, inner=dict.fromkeys(calls, 1))
    median = {run: sorted(us)[len(us) // 2] for run, us in samples.items()}
    least = {run: f"{min(us) / 1e3:.3f}" for run, us in samples.items()}
    own, other = (
        min((r for r in runs if r.endswith(kind)), key=median.__getitem__) for kind in ("strided", "fan-in")
    )
    times = [
        least[own],
        runs[own][0],
        least["cpu-strided, strided"],
        least[other],
        runs[other][0],
        least["N:M"],
    ]
    return [least["F.linear"], *times, *(ratio(median[run], median[own]) for run in ("F.linear", other))]


if __name__ == "__main__":
    main()
