"""Training step of one linear layer, forward + backward: compact storage against masked dense and sparselab.

    python -m benchmarks.compact_linear [--threads 1] [--rounds 25] [--dtype float32]

Gradients of input, weight and bias each time.  "masked" is ``F.linear(x, w * mask, b)``, what masked storage runs;
"dense" is the same without the mask, the best dense alternative.  Ratios are against masked.  Layers whose ratio is
below 1 are part of the table.  sparselab's layer is timed where it is installed.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks.timing import arguments, environment, ratio
from fxsparse.formats import csr
from fxsparse.kernels import csr_linear
from fxsparse.timing import interleaved_medians

_PEERS: list[torch.nn.Module] = []
"""Kept alive: sparselab caches transposes by id(), and a new layer at an old address gets the old one's."""

LAYERS = ((768, 3072, 512), (3072, 768, 512), (256, 256, 64), (1024, 1024, 2048))
"""(in, out, tokens)."""
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)


def main() -> None:
    """Print the tables."""
    options = arguments(__doc__ or "", 25)
    dtype = getattr(torch, options.dtype)
    rows = [row(*layer, sparsity, dtype, options.rounds) for layer in LAYERS for sparsity in SPARSITIES]
    headers = ["in", "out", "tokens", "sparsity %", "dense ms", "masked ms", "compact ms", "against masked"]
    headers += ["against dense", "sparselab ms", "against sparselab"]
    print(f"Forward + backward, median of {options.rounds} interleaved runs. {environment(dtype)}")
    print(tabulate(rows, headers, floatfmt=".2f", disable_numparse=True))
    print("\nTraining state: weights + gradients + two Adam states + indices, MB, and of dense")
    state = [state_row(i, o, s) for i, o in ((768, 3072), (3072, 768)) for s in (0.9, 0.95, 0.99)]
    print(
        tabulate(state, ["in", "out", "sparsity %", "dense MB", "compact MB", "of dense %"], floatfmt=".2f")
    )


def row(
    in_features: int, out_features: int, tokens: int, sparsity: float, dtype: torch.dtype, rounds: int
) -> list[str]:
    """One line of the first table."""
    mask = torch.rand(out_features, in_features) >= sparsity
    weight = torch.randn(out_features, in_features, dtype=dtype)
    bias = torch.randn(out_features, dtype=dtype)
    x = torch.randn(tokens, in_features, dtype=dtype)
    upstream = torch.randn(tokens, out_features, dtype=dtype)
    calls = {
        "dense": step(lambda x, w, b: F.linear(x, w, b), x, weight, bias, upstream),
        "masked": step(lambda x, w, b: F.linear(x, w * mask, b), x, weight, bias, upstream),
        "compact": compact_step(x, weight, mask, bias, upstream),
    }
    if dtype == torch.float32 and (peer := sparselab_step(x, sparsity, out_features, upstream)) is not None:
        calls["sparselab"] = peer
    times = interleaved_medians(calls, rounds=rounds)
    compact, peer_time = times["compact"], times.get("sparselab")
    return [
        *(str(number) for number in (in_features, out_features, tokens)),
        f"{100 * sparsity:.0f}",
        *(f"{times[name] / 1e3:.2f}" for name in ("dense", "masked", "compact")),
        ratio(times["masked"], compact),
        ratio(times["dense"], compact),
        "-" if peer_time is None else f"{peer_time / 1e3:.2f}",
        "-" if peer_time is None else ratio(peer_time, compact),
    ]


def step(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor
) -> Callable[[], object]:
    """Forward and backward of ``function(x, weight, bias)``."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def compact_step(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, upstream: Tensor
) -> Callable[[], object]:
    """The same with the masked weight in CSR."""
    index = csr.from_mask(mask)

    def linear(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return csr_linear(x, values, index.crow, index.cols, index.ccol, index.rows_t, index.perm, bias)

    return step(linear, x, csr.values_of(weight, index), bias, upstream)


def sparselab_step(
    x: Tensor, sparsity: float, out_features: int, upstream: Tensor
) -> Callable[[], object] | None:
    """The same by sparselab's layer, or None where it is not installed."""
    try:
        sparselab = importlib.import_module("sparselab")
    except ImportError:
        return None
    layer = sparselab.SparseLinear(x.shape[1], out_features, sparsity=sparsity)
    _PEERS.append(layer)
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    return lambda: torch.autograd.grad(layer(leaves[0]), leaves, upstream)


def state_row(in_features: int, out_features: int, sparsity: float) -> list[float]:
    """Bytes that a training step keeps for the weight, counted from the tensors, in MB."""
    mask = torch.rand(out_features, in_features) >= sparsity
    index = csr.from_mask(mask)
    values = torch.nn.Parameter(torch.randn(index.perm.numel()))
    optimizer = torch.optim.Adam([values])
    values.grad = torch.zeros_like(values)
    optimizer.step()
    moments = [t for t in optimizer.state[values].values() if t.shape == values.shape]
    kept = [values, values.grad, *moments, index.indices, index.crow, index.ccol, index.rows_t, index.perm]
    compact = sum(tensor.nbytes for tensor in kept)
    dense = 4 * mask.numel() * values.element_size()
    return [in_features, out_features, 100 * sparsity, dense / 1e6, compact / 1e6, 100 * compact / dense]


if __name__ == "__main__":
    main()
