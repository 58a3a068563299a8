"""Ways to compute one result, side by side: checked against fp64 first, then timed in turns."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import FAILURES, Call, Ready, precision, reason, times
from fxsparse.choosing import choose
from fxsparse.errors import FxSparseError
from fxsparse.kernel import Problem, registered
from fxsparse.testing import problem_of

OURS = "fxsparse "
"""What the names of our kernels begin with."""
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest norm of the error relative to that of the result."""
TF32_ALLOWED = 2e-3
_WARNINGS = ("Sparse (CSR|BSR) tensor support", "The PyTorch API of SparseSemiStructuredTensor")


@dataclass(frozen=True)
class Rival:
    """One way: `make` packs what it needs, untimed, and returns calls that do the same on copies of the weight."""

    name: str
    make: Callable[[], Sequence[Call]]
    exact: Sequence[Tensor]
    """What a call returns, in fp64."""
    see: Callable[[Any], Sequence[Tensor]] = field(default=lambda y: (y,))
    """The tensors of a call's result that correspond to `exact`."""
    tf32: bool = False


def compare(rivals: Sequence[Rival], device: torch.device, seconds: float = 0.5) -> dict[str, Any]:
    """{"us" and "calls_us": {rival: spread}, "errors": {rival: relative}, "missing": {rival: why}, "uncaptured"}.

    The first rival is the dense one.

    Raises:
        ValueError: that one is missing.
    """
    ready: dict[str, Ready] = {}
    errors: dict[str, float] = {}
    missing: dict[str, str] = {}
    for rival in rivals:
        try:
            ready[rival.name], errors[rival.name] = _checked(rival)
        except (*FAILURES, *triton_errors()) as error:
            missing[rival.name] = reason(error)
            if device.type == "cuda":
                torch.cuda.synchronize()  # a broken device ends the run here
    if rivals[0].name not in ready:
        raise ValueError(f"expected {rivals[0].name} to run, got {missing[rivals[0].name]}")
    found = times(ready, device, seconds)
    kept = {"us": found.us, "calls_us": found.calls_us, "errors": errors}
    return {**kept, "missing": missing, "uncaptured": found.uncaptured}


def kernel(
    name: str, weight: Tensor, x: Tensor, bias: Tensor | None, exact: Tensor, copies: int = 1
) -> Rival:
    """Our kernel of this name, with so many copies of its buffers."""
    entry = registered()[name]

    def make() -> list[Call]:
        packed = list(entry.pack(weight).values())
        sets = [packed, *([t.clone() for t in packed] for _ in range(copies - 1))]
        return [partial(entry.run, x, bias, *each, in_features=weight.shape[1]) for each in sets]

    return Rival(OURS + name, make, (exact,))


def chosen(weight: Tensor, x: Tensor, bias: Tensor | None = None, training: bool = False) -> str:
    """The kernel that `choose` takes, or why it does not; what tunes itself while it measures has done so then."""
    try:
        with torch.set_grad_enabled(training):
            return choose(problem(weight, x, training), x, weight, bias).kernel.name
    except (*FAILURES, *triton_errors(), FxSparseError) as error:
        return reason(error)


def problem(weight: Tensor, x: Tensor, training: bool = False) -> Problem:
    """Of applying `weight` [out, in] to x [batch, in]."""
    arguments = {"in_features": weight.shape[1]}
    return problem_of(registered()["dense"], weight, len(x), weight.dtype, training, arguments)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers on the generator's device, none of them 0, as a few of millions would be.

    Not from the default generator, which a CUDA graph that failed leaves unusable.
    """
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.masked_fill_(values == 0, 1)


def csr32(weight: Tensor) -> Tensor:
    """`weight` as torch's CSR tensor with int32 indices, which its libraries are fastest with."""
    csr = weight.to_sparse_csr()
    parts = csr.crow_indices().int(), csr.col_indices().int(), csr.values()
    return torch.sparse_csr_tensor(*parts, size=weight.shape, check_invariants=False)


def ours(us: Mapping[str, Sequence[float]]) -> float | None:
    """The median of our fastest kernel."""
    return min((s[2] for name, s in us.items() if name.startswith(OURS)), default=None)


def _checked(rival: Rival) -> tuple[Ready, float]:
    """Its calls and the error of the first, into memory that held NaN.

    Raises:
        ValueError: that is larger than rounding explains.
    """
    with warnings.catch_warnings(), precision(rival.tf32):
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        calls = rival.make()
        _poison(calls[0]())
        results = rival.see(calls[0]())
    error = max(_error(y, exact) for y, exact in zip(results, rival.exact, strict=True))
    allowed = TF32_ALLOWED if rival.tf32 else ALLOWED[results[0].dtype]
    if not error <= allowed:
        raise ValueError(f"{rival.name}: expected a relative error of at most {allowed:.0e}, got {error:.1e}")
    return Ready(calls, rival.tf32), error


@torch.no_grad()
def _poison(result: Tensor | Sequence[Tensor]) -> None:
    """Leave NaN where the next result will probably lie, so that an entry nobody writes is seen."""
    for y in (result,) if isinstance(result, Tensor) else result:
        y.fill_(torch.nan)


def _error(y: Tensor, exact: Tensor) -> float:
    if y.shape != exact.shape:
        raise ValueError(f"expected a result of shape {list(exact.shape)}, got {list(y.shape)}")
    scale = exact.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return float((y.double() - exact).norm() / scale)


def triton_errors() -> tuple[type[Exception], ...]:
    """Triton's own errors (too large a tile, a kernel that does not compile), where Triton is installed."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)
