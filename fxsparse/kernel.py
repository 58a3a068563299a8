"""One way to run one op on one format: the registry, and the measured choice among candidates."""

import functools
import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse import machine
from fxsparse.errors import UnsupportedError
from fxsparse.timing import interleaved_quartiles


@dataclass(frozen=True)
class Problem:
    """One call site, as far as a kernel may care."""

    op: str
    """"linear" or "conv2d", which stands for one dimension, too."""
    shape: tuple[int, ...]
    """Dense shape of the weight."""
    batch: int
    """Rows of the input, the product of its leading dimensions; of a convolution, output pixels of all samples."""
    nnz: int
    dtype: torch.dtype
    device: torch.device
    training: bool
    fan_in: int | None = None
    """Nonzeros of every active row where that is one number, else None."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """What a kernel's `run` takes by name: in_features; of a convolution kernel_size, in_channels, stride and so on."""
    is_blocked: bool = False
    """The zeros lie in blocks of at least four."""


@dataclass(frozen=True)
class Cost:
    """What one run of a kernel does, forward and (in training) backward."""

    flops: int
    """2 x multiply-adds."""
    bytes: int
    """Weight storage read by one forward."""


@dataclass(frozen=True)
class Entries:
    """A weight by its nonzeros, by row and then by column; what is packed where a dense weight would not fit."""

    values: Tensor
    """[nnz]."""
    indices: Tensor
    """int32 [2, nnz]: rows and columns in the matrix [out, fan-in]."""
    shape: tuple[int, ...]
    """Dense shape of the weight."""


@dataclass(frozen=True)
class Kernel:
    """A kernel entry; `refuses` answers with reasons and never raises.

    `pack` turns a dense weight (zeros are zeros) into buffers; `pack_entries` makes the same of the nonzeros, without a
    tensor of the dense size, and a kernel that has none serves dense weights only.  `run` and `reference` take
    ``(x, bias, *buffers in order, activation="none", **problem.arguments)``, so that a pass can write them into a
    graph.  Where they take ``residual``, too, that is a tensor of the result's shape, added before the activation.
    """

    name: str
    op: str
    format: str
    pack: Callable[[Tensor], Mapping[str, Tensor]]
    run: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    refuses: Callable[[Problem], list[str]]
    cost: Callable[[Problem], Cost]
    pack_entries: Callable[[Entries], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Choice:
    """The kernel for one call site, and the measurement behind it."""

    kernel: Kernel
    times_us: Mapping[str, float]
    """Lower quartile of each candidate, microseconds."""
    refusals: Mapping[str, list[str]]
    reason: str
    recalled: bool = False
    """The times are an earlier process's on this machine."""


TRAINING = {
    "linear": "cpu-csr-train",
    "conv1d": "cpu-csr-conv-train",
    "conv2d": "cpu-csr-conv-train",
}
"""The kernels that compact storage trains with, by op; their `run` also takes ``probe_key``."""

OF_THE_WEIGHT = ("in_features", "kernel_size", "in_channels")
"""The `Problem.arguments` that a dense op reads off its weight."""

_CHECKED_PRODUCTS = 1 << 16
"""Multiply-adds of the plain PyTorch product that checks a kernel on a weight given by its entries."""

MEASURED_SECONDS = 2.0
"""For one choice, all candidates together."""

_REGISTRY: dict[str, Kernel] = {}
_GLUE: dict[str, Callable[..., Tensor]] = {}
_CHOICES: dict[tuple, Choice] = {}


def register(kernel: Kernel) -> Kernel:
    """Make `kernel` a candidate everywhere; ValueError on a name that is taken."""
    if kernel.name in _REGISTRY:
        raise ValueError(f"a kernel named {kernel.name!r} is registered already")
    _REGISTRY[kernel.name] = kernel
    return kernel


def register_glue(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a function a faster form of the op of its name that has no weight, such as a pooling; for inference."""
    _GLUE[run.__name__] = run
    return run


def glue(name: str) -> Callable[..., Tensor]:
    """What was registered for an op without a weight."""
    import fxsparse.kernels  # noqa: F401  its modules register themselves

    return _GLUE[name]


def registered() -> dict[str, Kernel]:
    """Every kernel by name: the shipped ones first, then those registered by others."""
    import fxsparse.kernels  # noqa: F401  its modules register themselves

    return dict(_REGISTRY)


def candidates(problem: Problem, *, by_entries: bool = False) -> tuple[list[Kernel], dict[str, list[str]]]:
    """The kernels that can run `problem`, and for each of the others its reasons not to.

    With `by_entries` the weight is there as `Entries` only.
    """
    refusals = {name: _reasons(kernel, problem, by_entries) for name, kernel in registered().items()}
    usable = [kernel for name, kernel in registered().items() if not refusals[name]]
    return usable, {name: reasons for name, reasons in refusals.items() if reasons}


def choose(
    problem: Problem,
    x: Tensor,
    weight: Tensor | Entries,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    advantage: float = 0.95,
    rounds: int = 21,
) -> Choice:
    """Measure every candidate on `x` and return the fastest one that is correct.

    `weight` is dense with its zeros in place, or its `Entries`, which no dense kernel packs.  Candidates run in turns,
    `rounds` times each or fewer where they are slow, and their lower quartiles count: a sparse kernel is taken only
    where its own is at most `advantage` of the best dense one's.  Training problems time forward + backward with
    gradients of x and the weight.  Times are remembered, in this process and on disk (`fxsparse.machine`), for the same
    problem, processor, threads and kernels.  UnsupportedError, with the reasons of every kernel, if none can run.
    """
    device = torch.cuda.get_device_name(problem.device) if problem.device.type == "cuda" else "cpu"
    by_entries = isinstance(weight, Entries)
    key = (
        problem,
        by_entries,
        bias is not None,
        activation,
        device,
        torch.get_num_threads(),
        _kernel_versions(),
    )
    if (key, advantage) not in _CHOICES:
        found = machine.recall(key)
        if found is None:
            usable, refusals = candidates(problem, by_entries=by_entries)
            times, refusals = _measured(problem, usable, refusals, (x, weight, bias, activation), rounds)
            machine.remember(key, {"times_us": times, "refusals": refusals})
            _CHOICES[key, advantage] = _fastest(times, refusals, advantage)
        else:
            _CHOICES[key, advantage] = replace(_fastest(**found, advantage=advantage), recalled=True)
    return _CHOICES[key, advantage]


def limit_us(kernel: Kernel, problem: Problem) -> float:
    """Microseconds that the FLOPs and the weight's bytes of this kernel take at the least (`machine.limit_us`)."""
    cost = kernel.cost(problem)
    return machine.limit_us(cost.flops, cost.bytes, problem.dtype)


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Error allowed for sums of `terms` products kept in `dtype`, relative to the sum of their magnitudes.

    Sums are carried in at least fp32, where random rounding grows with the root of the number of terms; the
    result is rounded once to `dtype`.
    """
    carried = torch.promote_types(dtype, torch.float32)
    return torch.finfo(dtype).eps + 2 * max(1, terms) ** 0.5 * torch.finfo(carried).eps


def capabilities() -> list[dict[str, object]]:
    """One row per kernel: what it does, and on this machine for which dtypes or why not."""
    rows = []
    for name, kernel in registered().items():
        reasons = {
            d: _either_mode(kernel, d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        }
        dtypes = [str(d).removeprefix("torch.") for d, why in reasons.items() if not why]
        available = "yes" if dtypes else "; ".join(reasons[torch.float32])
        rows.append(
            {
                "kernel": name,
                "op": kernel.op,
                "format": kernel.format,
                "dtypes": dtypes,
                "available": available,
            }
        )
    return rows


def packed(kernel: Kernel, weight: Tensor | Entries) -> Mapping[str, Tensor]:
    """The buffers of `kernel`, which has to be able to pack such a weight."""
    if isinstance(weight, Tensor):
        return kernel.pack(weight.detach())
    assert kernel.pack_entries is not None, f"{kernel.name} is no candidate"
    return kernel.pack_entries(weight)


def _reasons(kernel: Kernel, problem: Problem, by_entries: bool) -> list[str]:
    if kernel.op != problem.op:
        return [f"it computes {kernel.op}, not {problem.op}"]
    unpacked = by_entries and kernel.pack_entries is None
    return kernel.refuses(problem) + (["it packs dense weights only"] if unpacked else [])


def _either_mode(kernel: Kernel, dtype: torch.dtype) -> list[str]:
    """Why `kernel` refuses a small layer of `dtype` on the CPU in the mode that it refuses less."""
    modes = [
        Problem(kernel.op, (64, 64), 64, 512, dtype, torch.device("cpu"), mode, 8) for mode in (False, True)
    ]
    return min((kernel.refuses(problem) for problem in modes), key=len)


def _kernel_versions() -> tuple[str, ...]:
    """Every kernel with what its code is: times of other code say nothing."""
    from fxsparse.kernels import cpu

    modules = {name: sys.modules.get(kernel.run.__module__) for name, kernel in registered().items()}
    return cpu.version(), *(f"{n} {_digest(getattr(m, '__file__', None))}" for n, m in modules.items())


@functools.cache
def _digest(file: str | None) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""


def _measured(
    problem: Problem, usable, refusals, call, rounds: int
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Microseconds of every usable kernel whose result is right, and why the others are not among them."""
    refusals = dict(refusals)
    timers = {}
    for kernel in usable:
        timer, output = _prepared(kernel, problem, *call)
        error = _error(output, problem, *call)
        allowed = tolerance(problem.dtype, torch.Size(problem.shape[1:]).numel() + 1)
        if error > allowed:
            refusals[kernel.name] = [
                f"its result is wrong here: relative error {error:.1e}, allowed {allowed:.1e}"
            ]
        else:
            timers[kernel.name] = timer
    if not timers:
        raise UnsupportedError(_nothing_runs(problem, refusals))
    return interleaved_quartiles(timers, rounds=rounds, seconds=MEASURED_SECONDS), refusals


def _fastest(times_us: Mapping[str, float], refusals: Mapping[str, list[str]], advantage: float) -> Choice:
    """The choice by these times."""
    dense = [name for name in times_us if registered()[name].format == "dense"]
    fastest = min(times_us, key=times_us.__getitem__)
    best_dense = min(dense, key=times_us.__getitem__, default=fastest)
    taken = fastest if times_us[fastest] <= advantage * times_us[best_dense] else best_dense
    return Choice(
        registered()[taken], times_us, refusals, _reason(taken, best_dense, fastest, times_us, refusals)
    )


def _prepared(
    kernel: Kernel, problem: Problem, x, weight, bias, activation
) -> tuple[Callable[[], None], Tensor]:
    """A function that runs `kernel` once as `problem` says, and its output."""
    arguments = dict(problem.arguments)
    buffers = [tensor.detach() for tensor in packed(kernel, weight).values()]
    if not problem.training:
        x = x.detach()

        def infer() -> Tensor:
            with torch.no_grad():
                return kernel.run(x, bias, *buffers, activation=activation, **arguments)

        return _synchronised(infer, problem.device), infer()
    x = x.detach().requires_grad_()
    for tensor in buffers:
        tensor.requires_grad_(tensor.is_floating_point())
    leaves = [x, *(tensor for tensor in buffers if tensor.requires_grad)]
    output = kernel.run(x, bias, *buffers, activation=activation, **arguments)
    upstream = torch.ones_like(output)

    def train() -> object:
        return torch.autograd.grad(
            kernel.run(x, bias, *buffers, activation=activation, **arguments), leaves, upstream
        )

    return _synchronised(train, problem.device), output.detach()


def _synchronised(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _error(
    output: Tensor,
    problem: Problem,
    x: Tensor,
    weight: Tensor | Entries,
    bias: Tensor | None,
    activation: str,
) -> float:
    """Largest difference from the fp64 result, relative to the largest sum of magnitudes."""
    from fxsparse.kernels.library import activate

    if isinstance(weight, Entries) and problem.op == "linear":
        few = max(1, _CHECKED_PRODUCTS // max(1, problem.nnz))
        x, output = x.reshape(-1, x.shape[-1])[:few], output.reshape(-1, output.shape[-1])[:few]
    op, values = _exact_op(problem, weight)
    with torch.no_grad():
        inputs = [None if t is None else t.double() for t in (x, values, bias)]
        exact = activate(op(*inputs), activation)
        if exact.numel() == 0:
            return 0.0
        scale = op(*(None if t is None else t.abs() for t in inputs)).max()
        return ((output.double() - exact).abs().max() / scale.clamp_min(torch.finfo(scale.dtype).tiny)).item()


def _exact_op(problem: Problem, weight: Tensor | Entries) -> tuple[Callable[..., Tensor], Tensor]:
    """A function of (x, values, bias) in plain PyTorch, and the values: the dense weight, or its entries."""
    arguments = dict(problem.arguments)
    if isinstance(weight, Tensor):
        for name in OF_THE_WEIGHT:
            arguments.pop(name, None)
        op: Any = {2: F.linear, 3: F.conv1d, 4: F.conv2d}[weight.dim()]
        return functools.partial(op, **arguments), weight
    trained = registered()[TRAINING[problem.op]]
    buffers = dict(packed(trained, weight))
    stored = buffers.pop("values")

    def exact(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return trained.reference(x, bias, values, *buffers.values(), **arguments)

    return exact, stored


def _reason(taken: str, best_dense: str, fastest: str, times: Mapping[str, float], refusals) -> str:
    if taken != best_dense:
        return f"{taken} {times[taken]:.1f} us, {times[best_dense] / times[taken]:.2f}x of {best_dense}"
    if len(times) == 1:
        reasons = "; ".join(f"{name}: {why[0]}" for name, why in refusals.items())
        return f"{taken} is the only candidate ({reasons})" if reasons else f"{taken} is the only candidate"
    rest = {name: time_us for name, time_us in times.items() if name != taken}
    other = min(rest, key=rest.__getitem__)
    return f"{taken} {times[taken]:.1f} us; the next best, {other}, {times[other]:.1f} us"


def _nothing_runs(problem: Problem, refusals: Mapping[str, list[str]]) -> str:
    lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals.items()]
    return "\n".join(
        [f"no kernel can run {problem}:", *lines, "Add one with fxsparse.kernel.register(Kernel(...))."]
    )
