"""What int8 and bfloat16 values cost and gain in inference: linear layers, then whole models at 90 % zeros.

    python -m benchmarks.precision [--threads 1] [--rounds 15] [--models ResNet-18 ViT-B/16 BERT-base]

Layers: the fastest kernel of each dtype of values, least microseconds of interleaved samples; a sample at batch 1 is 20
calls in a row, which find the weight in the caches that hold it.  Whole models: compiled with each dtype, in turns.
Errors are the largest of an output relative to the largest output.  Random weights and inputs, zeros by magnitude.
"""

from collections.abc import Callable, Sequence

import torch
from tabulate import tabulate
from torch import Tensor

import fxsparse
from benchmarks.models.published import WHOLE
from benchmarks.timing import environment, parser
from fxsparse.choosing import rounding_error
from fxsparse.formats import narrow
from fxsparse.kernel import Kernel, registered
from fxsparse.testing import problem_of
from fxsparse.timing import interleaved_samples

LAYERS = ((768, 3072), (3072, 768), (4096, 4096))
"""(in, out)."""
SPARSITIES = (0.9, 0.95, 0.99)
BATCHES = (1, 16, 256)
WHOLE_SPARSITY = 0.9
FORMATS = ("cpu-csr", "cpu-lookup", "cpu-striped")
VALUES = ("float32", *narrow.DTYPES)


def main() -> None:
    """Print both tables."""
    made = parser(__doc__ or "", 15)
    made.add_argument(
        "--models", nargs="*", default=["ResNet-18", "ViT-B/16", "BERT-base"], choices=list(WHOLE)
    )
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(environment(torch.float32))
    with torch.no_grad():
        rows = [
            row
            for layer in LAYERS
            for sparsity in SPARSITIES
            for row in of_layer(layer, sparsity, options.rounds)
        ]
        print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
        whole = [of_model(name, options.rounds) for name in options.models]
        print("\n" + tabulate(whole, headers="keys", tablefmt="github", disable_numparse=True))


def of_layer(
    layer: tuple[int, int], sparsity: float, rounds: int, batches: Sequence[int] = BATCHES
) -> list[dict[str, str]]:
    """A row for each batch."""
    weight = torch.randn(layer[1], layer[0])
    kept = weight.abs() > weight.abs().flatten().kthvalue(round(sparsity * weight.numel())).values
    weight = weight * kept
    packed = {name: tuple(kernel.pack(weight).values()) for name, kernel in _kernels(weight).items()}
    rows = []
    for batch in batches:
        x = torch.randn(batch, layer[0])
        calls = {name: _call(name, x, buffers, layer[0]) for name, buffers in packed.items()}
        times = _least(calls, rounds if batch < 256 else min(rounds, 7), 20 if batch == 1 else 1)
        row = {"in → out": f"{layer[0]} → {layer[1]}", "zeros": f"{sparsity:.0%}", "batch": str(batch)}
        rows.append(row | _cells(times, x, weight))
    return rows


def of_model(name: str, rounds: int, sparsity: float = WHOLE_SPARSITY) -> dict[str, str]:
    """The row of a whole model on one sample."""
    published = WHOLE[name]
    model, x = published.pruned(sparsity), published.inputs(1)
    made = {
        values: fxsparse.compile(
            model, mode="infer", example_inputs=x, values=None if values == "float32" else values
        )
        for values in VALUES
    }
    times = _least({values: lambda fast=fast: fast(x) for values, fast in made.items()}, rounds, 1)
    row = {"model": name, "zeros": f"{sparsity:.0%}", "float32 (ms)": f"{times['float32'] / 1e3:.1f}"}
    for values in narrow.DTYPES:
        report = made[values].report
        rounded = sum(layer["values"] == values for layer in report.layers)
        row |= {
            f"{values} (ms)": f"{times[values] / 1e3:.1f}",
            f"{values}, faster": f"{times['float32'] / times[values]:.2f}x",
            f"{values}, weights": f"{rounded} of {len(report.layers)}",
            f"{values}, bytes": f"{report.totals['bytes_sparse'] / made['float32'].report.totals['bytes_sparse']:.2f}x",
            f"{values}, error": f"{report.totals['values_error']:.1e}",
        }
    return row


def _kernels(weight: Tensor) -> dict[str, Kernel]:
    names = [f"{name}{'' if values == 'float32' else '-' + values}" for values in VALUES for name in FORMATS]
    found = {name: registered()[name] for name in names}
    return {
        name: k for name, k in found.items() if not k.refuses(problem_of(k, weight, 1, weight.dtype, False))
    }


def _call(name: str, x: Tensor, buffers: tuple[Tensor, ...], in_features: int) -> Callable[[], Tensor]:
    kernel = registered()[name]
    return lambda: kernel.run(x, None, *buffers, in_features=in_features)


def _least(calls: dict[str, Callable[[], Tensor]], rounds: int, inner: int) -> dict[str, float]:
    samples = interleaved_samples(calls, rounds=rounds, warm_up=1, inner=dict.fromkeys(calls, inner))
    return {name: min(values) for name, values in samples.items()}


def _cells(times: dict[str, float], x: Tensor, weight: Tensor) -> dict[str, str]:
    """Time and kernel of the fastest for each dtype, and what the narrow ones gain and lose."""
    best = {values: min(_of(values, times), key=times.__getitem__) for values in VALUES}
    exact = times[best["float32"]]
    row = {"float32 (us)": f"{exact:.1f} {_layout(best['float32'])}"}
    for values in narrow.DTYPES:
        kernel = registered()[best[values]]
        problem = problem_of(kernel, weight, len(x), weight.dtype, False, {"in_features": weight.shape[1]})
        row |= {
            f"{values} (us)": f"{times[kernel.name]:.1f} {_layout(kernel.name)}",
            f"{values}, faster": f"{exact / times[kernel.name]:.2f}x",
            f"{values}, error": f"{rounding_error(kernel, problem, x, weight, None, 'none'):.1e}",
        }
    return row


def _of(values: str, times: dict[str, float]) -> list[str]:
    dtype = narrow.DTYPES.get(values)
    return [name for name in times if registered()[name].values == dtype]


def _layout(name: str) -> str:
    return registered()[name].format


if __name__ == "__main__":
    main()
