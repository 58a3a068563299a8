"""Training step of one convolution, forward + backward: compact storage against the dense convolution.

    python -m benchmarks.compact_conv [--threads 1] [--rounds 15] [--dtype float32]

Gradients of input and weight each time; "dense" is ``F.conv2d`` without a mask, the best alternative.  Layers whose
ratio is below 1 are part of the table.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks.timing import arguments, environment, ratio
from fxsparse.formats import csr
from fxsparse.kernels import csr_conv2d
from fxsparse.timing import interleaved_medians

LAYERS = (
    (8, 256, 256, 14, 3, 1, 1),
    (8, 1024, 256, 14, 1, 1, 1),
    (8, 64, 64, 56, 3, 1, 1),
    (8, 128, 128, 28, 3, 2, 1),
    (8, 512, 512, 7, 3, 1, 1),
    (8, 256, 512, 14, 1, 2, 1),
    (8, 3, 64, 64, 7, 2, 1),
    (8, 128, 128, 28, 3, 1, 32),
)
"""(samples, in, out, height and width, kernel, stride, groups)."""
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)


def main() -> None:
    """Print the table."""
    options = arguments(__doc__ or "", 15)
    dtype = getattr(torch, options.dtype)
    rows = [row(*layer, sparsity, dtype, options.rounds) for layer in LAYERS for sparsity in SPARSITIES]
    headers = ["samples", "in", "out", "size", "kernel", "stride", "groups", "sparsity %", "dense ms"]
    print(f"Forward + backward, median of {options.rounds} interleaved runs. {environment(dtype)}")
    print(tabulate(rows, [*headers, "compact ms", "against dense"], disable_numparse=True))


def row(
    samples: int,
    channels: int,
    out: int,
    size: int,
    kernel: int,
    stride: int,
    groups: int,
    sparsity: float,
    dtype: torch.dtype,
    rounds: int,
) -> list[str]:
    """One line of the table."""
    shape = (out, channels // groups, kernel, kernel)
    mask = torch.rand(shape).flatten(1) >= sparsity
    index, weight = csr.from_mask(mask), torch.randn(shape, dtype=dtype)
    given: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "groups": groups}
    x = torch.randn(samples, channels, size, size, dtype=dtype)
    window = {"kernel_size": (kernel, kernel), "in_channels": channels}
    upstream = torch.randn_like(F.conv2d(x, weight, **given))

    def sparse(x: Tensor, values: Tensor) -> Tensor:
        return csr_conv2d(x, values, index.crow, index.cols, **window, **given)

    calls = {
        "dense": step(lambda x, w: F.conv2d(x, w, **given), x, weight, upstream),
        "compact": step(sparse, x, csr.values_of(weight.flatten(1), index), upstream),
    }
    times = interleaved_medians(calls, rounds=rounds)
    numbers = (samples, channels, out, size, kernel, stride, groups)
    return [
        *(str(number) for number in numbers),
        f"{100 * sparsity:.0f}",
        *(f"{times[name] / 1e3:.2f}" for name in ("dense", "compact")),
        ratio(times["dense"], times["compact"]),
    ]


def step(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, upstream: Tensor
) -> Callable[[], object]:
    """Forward and backward of ``function(x, weight)``."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


if __name__ == "__main__":
    main()
