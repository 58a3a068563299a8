"""The measured choice among the kernels that can run a call site, and the limit that the machine sets them."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse import machine
from fxsparse.errors import UnsupportedError
from fxsparse.formats import narrow
from fxsparse.kernel import (
    OF_THE_WEIGHT,
    TRAINING,
    Entries,
    Kernel,
    Problem,
    candidates,
    packed,
    registered,
    tolerance,
)
from fxsparse.timing import interleaved_quartiles

Weight = TypeVar("Weight", Tensor, Entries)


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


_CHECKED_PRODUCTS = {True: 1 << 16, False: 1 << 28}
"""Multiply-adds of the plain PyTorch product that checks kernels, on a weight given by its entries, or a dense one."""

MEASURED_SECONDS = 2.0
"""For one choice, all candidates together."""

TIMED_SAMPLES = 4
"""Of a batch, or one for each thread: what a convolution is timed on.  `passes.SplitSamples` tries up to so many."""

_CHOICES: dict[tuple, Choice] = {}


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
    gradients of x and the weight.  Convolutions of other problems see `some_samples`, and their times are scaled to all
    of them.  Times are remembered, in this process and on disk (`fxsparse.machine`), for the same problem, processor,
    threads and kernels.  UnsupportedError, with the reasons of every kernel, if none can run.
    """
    from fxsparse.kernels import gpu

    problem, x, scale = some_samples(problem, x)
    is_gpu = problem.device.type == "cuda"
    device = f"{torch.cuda.get_device_name(problem.device)} {gpu.precision()}" if is_gpu else "cpu"
    by_entries = isinstance(weight, Entries)
    key = (
        problem,
        by_entries,
        bias is not None,
        activation,
        device,
        torch.get_num_threads(),
        kernel_versions(),
    )
    if (key, scale, advantage) not in _CHOICES:
        found = machine.recall(key)
        recalled = found is not None
        if found is None:
            usable, refusals = candidates(problem, by_entries=by_entries)
            times, refusals = _measured(problem, usable, refusals, (x, weight, bias, activation), rounds)
            found = {"times_us": times, "refusals": refusals}
            machine.remember(key, found)
        scaled = {name: scale * us for name, us in found["times_us"].items()}
        _CHOICES[key, scale, advantage] = _fastest(scaled, found["refusals"], advantage, recalled)
    return _CHOICES[key, scale, advantage]


def some_samples(problem: Problem, x: Tensor) -> tuple[Problem, Tensor, float]:
    """The part of a call that is timed, and how many times as much the whole is.

    That is `TIMED_SAMPLES` of a convolution on the CPU, for inference: a network runs as many at a time as its
    activations fit the caches with.  One convolution of them all would be timed with its images in memory, and its
    result in new pages of the system.
    """
    samples = max(TIMED_SAMPLES, torch.get_num_threads())
    is_batch = problem.op != "linear" and x.dim() == len(problem.shape) and len(x) > samples
    if problem.training or not is_batch or not x.is_cpu:
        return problem, x, 1.0
    return replace(problem, batch=problem.batch * samples // len(x)), x[:samples], len(x) / samples


def stored(kernel: Kernel, weight: Weight) -> Weight:
    """The weight whose products `kernel` computes: the one given, or with its values rounded to what it stores."""
    if kernel.values is None:
        return weight
    if isinstance(weight, Tensor):
        return narrow.nearest(weight, kernel.values)
    values, scales = narrow.rounded_entries(weight.values, weight.indices[0], weight.shape[0], kernel.values)
    return replace(weight, values=values.to(scales.dtype) * scales[weight.indices[0].long()])


def rounding_error(
    kernel: Kernel,
    problem: Problem,
    x: Tensor,
    weight: Tensor | Entries,
    bias: Tensor | None,
    activation: str,
) -> float:
    """Largest difference of the outputs from those of the weight as it came, relative to the largest of them."""
    _, output = _prepared(kernel, problem, x, weight, bias, activation)
    error, largest = _exact(problem, x, weight, bias, activation).error(output)
    return error / largest if largest else error


def limit_us(kernel: Kernel, problem: Problem) -> float:
    """Microseconds that the FLOPs and the weight's bytes of this kernel take on this machine at the least.

    The roofs are measured once, on the threads of this process: for FLOPs the faster of torch's dense product and
    independent multiply-adds in C++, for bytes the faster of torch's dot product and a C++ loop, over no more bytes
    than the weight has, so that they come from the cache that may hold it.  On a GPU they are those of PyTorch's dense
    product and of reading.  Where other work disturbed that measurement a kernel may come below the limit by as much.
    """
    from fxsparse.kernels import cpu, gpu

    cost = kernel.cost(problem)
    if problem.device.type == "cuda":
        flops = gpu.flops_per_second(problem.dtype, problem.device)
        read = gpu.bytes_per_second(1 << max(0, cost.bytes.bit_length() - 1), problem.device)
        return 1e6 * max(cost.flops / flops, cost.bytes / read)
    flops = max(machine.flops_per_second(problem.dtype), cpu.flops_per_second())
    size = 1 << min(27, max(14, cost.bytes.bit_length() - 1))  # 16 KiB to 128 MiB
    read = max(machine.bytes_per_second(max(size, 1 << 18)), cpu.bytes_per_second(size))
    return 1e6 * max(cost.flops / flops, cost.bytes / read)


def kernel_versions() -> tuple[str, ...]:
    """Every kernel with what its code is: times of other code say nothing."""
    from fxsparse.kernels import cpu
    from fxsparse.kernels.gpu import tuning

    modules = {name: kernel.run.__module__ for name, kernel in registered().items()}
    shared = map(machine.sources_digest, (tuning.__name__, tuning.LIBRARY))
    own = (f"{name} {machine.sources_digest(module)}" for name, module in modules.items())
    return cpu.version(), *shared, *own


def _measured(
    problem: Problem, usable, refusals, call, rounds: int
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Microseconds of every usable kernel whose result is right, and why the others are not among them."""
    from fxsparse.kernels import gpu
    from fxsparse.kernels.gpu import tuning

    refusals = dict(refusals)
    timers = {}
    exact: dict[torch.dtype | None, _Exact] = {}
    x, weight, *rest = call
    for kernel in usable:
        try:
            with tuning.measuring():
                timer, output = _prepared(kernel, problem, *call)
                if problem.device.type == "cuda":
                    timer()  # launches of the gradients are found here, and not while others are timed
        except gpu.failures() as error:
            refusals[kernel.name] = [f"it cannot be launched here: {error}"]
            continue
        if kernel.values not in exact:
            exact[kernel.values] = _exact(
                problem, x, stored(kernel, weight), *rest, few=_few(problem, x, weight)
            )
        error = exact[kernel.values].relative_error(output)
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


def _fastest(
    times_us: Mapping[str, float], refusals: Mapping[str, list[str]], advantage: float, recalled: bool
) -> Choice:
    """The choice by these times."""
    taken, reason = taken_of(times_us, advantage)
    return Choice(registered()[taken], times_us, refusals, reason or _alone(taken, refusals), recalled)


def taken_of(times_us: Mapping[str, float], advantage: float) -> tuple[str, str]:
    """The kernel to take by these times, and why; the reason is empty where it is the only one.

    A sparse kernel has to need at most `advantage` of the time of the best dense one, and one that stores its values
    in another dtype than the weight's as much of the best of the others.
    """
    entries = registered()
    exact = {name: us for name, us in times_us.items() if entries[name].values is None} or dict(times_us)
    rounded = {name: us for name, us in times_us.items() if name not in exact}
    dense = {name: us for name, us in exact.items() if entries[name].format == "dense"}
    fastest = min(exact, key=exact.__getitem__)
    best_dense = min(dense, key=dense.__getitem__, default=fastest)
    taken = fastest if exact[fastest] <= advantage * exact[best_dense] else best_dense
    reason = _reason(taken, best_dense, exact)
    if not rounded:
        return taken, reason
    best = min(rounded, key=rounded.__getitem__)
    if rounded[best] <= advantage * exact[taken]:
        return best, f"{best} {rounded[best]:.1f} us, {exact[taken] / rounded[best]:.2f}x of {taken}"
    kept = f"values stay as they are: {best} {rounded[best]:.1f} us"
    return taken, f"{reason}; {kept}" if reason else f"{taken} {exact[taken]:.1f} us; {kept}"


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


@dataclass(frozen=True)
class _Exact:
    """What a call should give, in fp64, for the first and the last `few` rows or samples; None for all of them."""

    few: int | None
    output: Tensor
    magnitudes: float
    """The largest sum of magnitudes."""

    def error(self, output: Tensor) -> tuple[float, float]:
        """Largest difference of a kernel's output from this one, and the largest entry of this one, where finite."""
        if self.output.numel() == 0:
            return 0.0, 0.0
        difference = (
            _ends(output.reshape(-1, *self.output.shape[1:]), self.few).to(self.output.dtype) - self.output
        )
        known = self.output.isfinite()  # what the inputs make inf or NaN says nothing of a kernel
        difference = difference.where(known, 0.0).abs().nan_to_num(nan=math.inf)
        return difference.max().item(), self.output.where(known, 0.0).abs().max().item()

    def relative_error(self, output: Tensor) -> float:
        """Largest difference relative to the largest sum of magnitudes."""
        return self.error(output)[0] / max(self.magnitudes, torch.finfo(torch.float64).tiny)


def _exact(
    problem: Problem,
    x: Tensor,
    weight: Tensor | Entries,
    bias: Tensor | None,
    activation: str,
    few: int | None = None,
) -> _Exact:
    """By plain PyTorch."""
    from fxsparse.kernels.library import activate

    op, values = _exact_op(problem, weight)
    x = _ends(x.reshape(-1, x.shape[-1]) if problem.op == "linear" else x, few)
    wide = torch.promote_types(problem.dtype, torch.float64)
    with torch.no_grad():
        inputs = [None if t is None else t.to(wide) for t in (x, values, bias)]
        output = activate(op(*inputs), activation)
        magnitudes = op(*(None if t is None else t.abs() for t in inputs))
    return _Exact(few, output, magnitudes.max().item() if magnitudes.numel() else 0.0)


def _few(problem: Problem, x: Tensor, weight: Tensor | Entries) -> int | None:
    """Half of the rows or samples that `_CHECKED_PRODUCTS` are enough for; None where that is all of them."""
    one_sample = problem.op != "linear" and x.dim() < len(problem.shape)
    samples = 1 if one_sample else x.shape[:-1].numel() if problem.op == "linear" else x.shape[0]
    by_entries = isinstance(weight, Entries)
    work = problem.batch * (problem.nnz if by_entries else weight.numel()) // max(1, samples)
    few = max(1, _CHECKED_PRODUCTS[by_entries] // max(1, 2 * work))
    return few if 2 * few < samples else None


def _ends(x: Tensor, few: int | None) -> Tensor:
    return x if few is None else torch.cat([x[:few], x[-few:]])


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


def _reason(taken: str, best_dense: str, times: Mapping[str, float]) -> str:
    if taken != best_dense:
        return f"{taken} {times[taken]:.1f} us, {times[best_dense] / times[taken]:.2f}x of {best_dense}"
    rest = {name: time_us for name, time_us in times.items() if name != taken}
    if not rest:
        return ""
    other = min(rest, key=rest.__getitem__)
    return f"{taken} {times[taken]:.1f} us; the next best, {other}, {times[other]:.1f} us"


def _alone(taken: str, refusals: Mapping[str, list[str]]) -> str:
    reasons = "; ".join(f"{name}: {why[0]}" for name, why in refusals.items())
    return f"{taken} is the only candidate ({reasons})" if reasons else f"{taken} is the only candidate"


def _nothing_runs(problem: Problem, refusals: Mapping[str, list[str]]) -> str:
    lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals.items()]
    return "\n".join(
        [f"no kernel can run {problem}:", *lines, "Add one with fxsparse.kernel.register(Kernel(...))."]
    )
