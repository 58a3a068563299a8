"""One way to run one op on one format: the registry, and the measured choice among candidates."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
    values: torch.dtype | None = None
    """What the values may be stored in, too, narrower than `dtype`; inference only."""
    group: tuple[int, int] | None = None
    """(N, M) where every aligned group of M inputs has at most N nonzeros (``formats.nm.group_of``)."""
    strides: int | None = None
    """M where no two of M inputs that lie a stride apart have nonzeros (``formats.strided.strides_of``)."""
    side: int | None = None
    """Of the square blocks that training multiplies on tensor cores; times of one say nothing of another."""

    @property
    def is_full(self) -> bool:
        """Whether there are no zeros."""
        return self.nnz == torch.Size(self.shape).numel()


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
    values: torch.dtype | None = None
    """What it stores the values in where that is not the weight's dtype: then `pack` rounds them (`formats.narrow`)."""


TRAINING = {
    "linear": "cpu-csr-train",
    "conv1d": "cpu-csr-conv-train",
    "conv2d": "cpu-csr-conv-train",
}
"""The kernels that compact storage trains with, by op; their `run` also takes ``probe_key``."""

TRAINING_ON_GPU = {"linear": "cuda-csr-train"}
"""Those on CUDA devices; for another op the one of TRAINING, which refuses and runs as its reference."""

TRAINING_IN_BLOCKS = {"linear": "cuda-bsr-train"}
"""Those on CUDA devices for weights in blocks that tensor cores multiply."""

ALL_TRAINING = frozenset((*TRAINING.values(), *TRAINING_ON_GPU.values(), *TRAINING_IN_BLOCKS.values()))
"""Their names."""

PLAIN = ("dense", "dense-conv")
"""The kernels that are PyTorch's own ops, which a graph has already."""

FOR_ALL_ENTRIES = ("dense", "depthwise")
"""The formats that zeros make no difference to."""

OF_THE_WEIGHT = ("in_features", "kernel_size", "in_channels")
"""The `Problem.arguments` that a dense op reads off its weight."""

_REGISTRY: dict[str, Kernel] = {}
_GLUE: dict[str, Callable[..., Any]] = {}


def register(kernel: Kernel) -> Kernel:
    """Make `kernel` a candidate everywhere; ValueError on a name that is taken."""
    if kernel.name in _REGISTRY:
        raise ValueError(f"a kernel named {kernel.name!r} is registered already")
    _REGISTRY[kernel.name] = kernel
    return kernel


def register_glue(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let passes find a function by its name: a form of an op without a weight, or one of images in lanes."""
    _GLUE[run.__name__] = run
    return run


def glue(name: str) -> Callable[..., Any]:
    """What `register_glue` was given."""
    import fxsparse.kernels  # noqa: F401  its modules register themselves

    return _GLUE[name]


def glues() -> tuple[str, ...]:
    """The names that `glue` knows."""
    import fxsparse.kernels  # noqa: F401  its modules register themselves

    return tuple(_GLUE)


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
        dtypes = [_named(d) for d, why in reasons.items() if not why]
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


def trained_by(op: str, device: torch.device, is_blocked: bool = False) -> Kernel:
    """The kernel that compact storage trains with on `device`, where nothing is measured."""
    names = TRAINING | TRAINING_ON_GPU if device.type == "cuda" else TRAINING
    if is_blocked and device.type == "cuda":
        names = names | TRAINING_IN_BLOCKS
    return registered()[names[op]]


def packed(kernel: Kernel, weight: Tensor | Entries) -> Mapping[str, Tensor]:
    """The buffers of `kernel`, which has to be able to pack such a weight."""
    if isinstance(weight, Tensor):
        return kernel.pack(weight.detach())
    assert kernel.pack_entries is not None, f"{kernel.name} is no candidate"
    return kernel.pack_entries(weight)


def _reasons(kernel: Kernel, problem: Problem, by_entries: bool) -> list[str]:
    if kernel.op != problem.op:
        return [f"it computes {kernel.op}, not {problem.op}"]
    if kernel.values not in (None, problem.values):
        return [f"it stores values in {_named(kernel.values)}, which was not asked for"]
    reasons = kernel.refuses(problem)
    if by_entries and kernel.pack_entries is None:
        reasons = [*reasons, "it packs dense weights only"]
    if problem.is_full and not problem.training and kernel.format not in FOR_ALL_ENTRIES:
        reasons = [*reasons, "the weight has no zeros"]
    return reasons


def _either_mode(kernel: Kernel, dtype: torch.dtype) -> list[str]:
    """Why `kernel` refuses small layers of `dtype`, on the device and in the mode that it refuses least.

    They are 1:8 and in blocks, or have one filter for each channel.
    """
    arguments = {"conv2d": (("kernel_size", (3, 3)), ("in_channels", 64))}.get(kernel.op, ())
    own = (*arguments, ("groups", 64))
    shapes = {"conv2d": (((64, 64, 3, 3), arguments), ((64, 1, 3, 3), own))}.get(kernel.op, (((64, 64), ()),))
    found = []
    for (shape, given), device, training in itertools.product(shapes, ("cuda", "cpu"), (False, True)):
        nnz = torch.Size(shape).numel() // 8
        cell = (kernel.op, shape, 64, nnz, dtype, torch.device(device), training, 8, given, True)
        missing = ["there is no GPU here"] if device == "cuda" and not torch.cuda.is_available() else []
        found.append(
            [*kernel.refuses(Problem(*cell, values=kernel.values, group=(1, 8), strides=8)), *missing]
        )
    return min(found, key=lambda why: (any(reason.startswith("it runs on ") for reason in why), len(why)))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
