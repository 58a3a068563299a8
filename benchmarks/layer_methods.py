"""The ways to run one SRigL layer that benchmarks.srigl_layer compares, as calls without arguments."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.engines import DeepSparse, export
from fxsparse.kernel import registered, tolerance

Call = Callable[[], Tensor]
ACTIVE_ONLY = (
    "structured",
    "structured compiled",
    "structured CSR",
    "lookup, no scatter",
    "condensed, no scatter",
)
"""These return the active rows alone, as the paper's benchmark does."""


def layer(
    rows: int, fan_in: int, dtype: torch.dtype, out_features: int = 768, in_features: int = 3072
) -> tuple[Tensor, Tensor]:
    """Weight [out, in] with `fan_in` entries in each of `rows` random rows and none in the others, and a bias."""
    active = torch.randperm(out_features)[:rows].sort().values
    columns = torch.rand(rows, in_features).topk(fan_in, 1).indices
    entries = torch.zeros(rows, in_features).scatter_(1, columns, torch.randn(rows, fan_in))
    return torch.zeros(out_features, in_features).index_copy_(0, active, entries).to(dtype), torch.randn(
        out_features
    ).to(dtype)


def calls(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Call]:
    """{method: call} of everything that runs in this process; CSR and the gather have no bfloat16."""
    active = weight.any(1)
    rows, row_bias = weight[active].contiguous(), bias[active].contiguous()
    linear = compiled(F.linear)
    made: dict[str, Call] = {
        "dense": lambda: F.linear(x, weight, bias),
        "dense compiled": lambda: linear(x, weight, bias),
        "structured": lambda: F.linear(x, rows, row_bias),
        "structured compiled": lambda: linear(x, rows, row_bias),
    }
    if x.dtype == torch.float32:
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        full, short = weight.to_sparse_csr(), rows.to_sparse_csr()
        packed = registered()["cpu-condensed"].pack(rows)
        gather, indices = compiled(gathered), packed["indices"].int()
        made |= {
            "CSR": lambda: F.linear(x, full, bias),
            "structured CSR": lambda: F.linear(x, short, row_bias),
            "gather compiled": lambda: gather(x, packed["values"], indices, row_bias),
        }
    for name in ("lookup", "condensed"):
        made[name] = kernel_call(f"cpu-{name}", x, weight, bias)
        made[f"{name}, no scatter"] = kernel_call(f"cpu-{name}", x, rows, row_bias)
    return made


def gathered(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
    """The expression that SRigL compiles for CPUs (arXiv:2305.02299); its output has the active rows alone."""
    return (values * x[:, indices]).sum(-1) + bias


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` by Inductor, for fixed shapes."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def kernel_call(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Call:
    """A call of the registered kernel `name`."""
    kernel = registered()[name]
    buffers = list(kernel.pack(weight).values())
    return lambda: kernel.run(x, bias, *buffers, in_features=weight.shape[1])


def check(name: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Compare the output of a method with the masked dense product in fp64.

    Raises:
        ValueError: it is off by more than rounding explains.
    """
    if name in ACTIVE_ONLY or name == "gather compiled":
        active = weight.any(1)
        weight, bias = weight[active], bias[active]
    exact = F.linear(x.double(), weight.double(), bias.double())
    scale = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs()).max()
    error = ((y.double() - exact).abs().max() / scale).item()
    allowed = tolerance(x.dtype, weight.shape[1] + 1)
    if not error <= allowed:
        raise ValueError(f"{name}: expected a relative error of at most {allowed:.1e}, got {error:.1e}")


@contextmanager
def deepsparse(
    python: str | None, x: Tensor, weight: Tensor, bias: Tensor, threads: int
) -> Iterator[DeepSparse | None]:
    """The layer in DeepSparse, of which `python` has one; None without it."""
    if python is None:
        yield None
        return
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.onnx")
        export(linear, x, path)
        engine = DeepSparse(python, path, x, threads)
    try:
        yield engine
    finally:
        engine.close()
