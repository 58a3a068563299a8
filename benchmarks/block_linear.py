"""Linear layers whose zeros lie in blocks: the block kernel beside those for any zeros, and dense ones.

``python -m benchmarks.block_linear [--dtype bfloat16] [--threads 1]``: 3,072 x 3,072, blocks of 16 x 16, 90 % zeros.
Least milliseconds, how many times faster than ``F.linear`` (medians), and the least that the nonzeros can take here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tabulate import tabulate

from benchmarks.timing import arguments, environment
from fxsparse.choosing import limit_us
from fxsparse.kernel import registered
from fxsparse.testing import problem_of
from fxsparse.timing import interleaved_samples

WIDTH, BLOCK, BATCHES = 3072, 16, (1, 16, 256)
KERNELS = ("cpu-bsr", "cpu-striped", "cpu-csr", "onednn")


def main() -> None:
    """Read the options, measure and print."""
    options = arguments(__doc__ or "", rounds=25)
    dtype = getattr(torch, options.dtype)
    kept = torch.rand(WIDTH // BLOCK, WIDTH // BLOCK) < 0.1
    mask = kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    weight = (torch.randn(WIDTH, WIDTH) * mask).to(dtype)
    rows = [row(weight, torch.randn(batch, WIDTH).to(dtype), KERNELS, options.rounds) for batch in BATCHES]
    print(environment(dtype))
    print(tabulate(rows, headers(KERNELS), tablefmt="github", disable_numparse=True))


def headers(kernels: Sequence[str]) -> list[str]:
    """Of the columns that `row` fills."""
    return ["batch", "F.linear (ms)", *(f"{name} (ms)" for name in kernels), "limit (ms)"]


@torch.no_grad()
def row(weight: torch.Tensor, x: torch.Tensor, kernels: Sequence[str], rounds: int) -> list[str]:
    """Least milliseconds, with ratios of medians to ``F.linear``, and the limit of the first kernel."""
    calls = {"dense": lambda: F.linear(x, weight)}
    for name in kernels:
        entry = registered()[name]
        packed = tuple(entry.pack(weight).values())
        calls[name] = lambda entry=entry, packed=packed: entry.run(
            x, None, *packed, in_features=weight.shape[1]
        )
    samples = interleaved_samples(calls, rounds=rounds, warm_up=2, inner=dict.fromkeys(calls, 1))
    median = {name: sorted(us)[len(us) // 2] for name, us in samples.items()}
    first = registered()[kernels[0]]
    limit = limit_us(first, problem_of(first, weight, len(x), weight.dtype, False))
    shown = [f"{min(samples[n]) / 1e3:.3f} ({median['dense'] / median[n]:.1f}x)" for n in kernels]
    return [str(len(x)), f"{min(samples['dense']) / 1e3:.3f}", *shown, f"{limit / 1e3:.3f}"]


if __name__ == "__main__":
    main()
