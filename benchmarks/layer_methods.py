"""The ways to run one SRigL layer that benchmarks.srigl_layer compares, as calls without arguments."""

import json
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

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
    return lambda: kernel.run(x, bias, *buffers)


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


class DeepSparse:
    """One layer in DeepSparse, in a process of `python`, which has deepsparse and onnx; leave with `close`."""

    def __init__(self, python: str, x: Tensor, weight: Tensor, bias: Tensor, threads: int) -> None:
        worker = Path(__file__).with_name("deepsparse_worker.py")
        self._process = subprocess.Popen(  # isolated: the files beside the worker are not its modules
            [python, "-I", str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            arrays = str(Path(folder, "layer.npz"))
            numpy.savez(arrays, weight=weight.numpy(), bias=bias.numpy(), x=x.numpy())
            loaded = self._ask(load=arrays, batch=len(x), threads=threads)
        self.output = torch.tensor(loaded["output"])

    def microseconds(self, runs: int) -> float:
        """Of one of `runs` runs in a row."""
        return self._ask(runs=runs)["us"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, **request: object) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise OSError(f"the DeepSparse worker ended with status {self._process.returncode} on {request}")
        return json.loads(answer)
