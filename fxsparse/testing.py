"""Contract checks that kernels, patterns and methods must pass; third parties run the same ones on theirs.

Each raises AssertionError with what was broken.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite, prod, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.choosing import stored
from fxsparse.formats import bsr, condensed, nm, strided
from fxsparse.guards import forbid_host_reads as forbid_host_reads
from fxsparse.guards import forbid_tensors_of as forbid_tensors_of
from fxsparse.guards import poisoned_memory as poisoned_memory
from fxsparse.kernel import OF_THE_WEIGHT, Entries, Kernel, Problem, tolerance
from fxsparse.kernels.library import ACTIVATIONS, activate
from fxsparse.method_checks import check_method as check_method
from fxsparse.method_checks import view_of as view_of
from fxsparse.pattern import NM, Pattern, Strided
from fxsparse.selection import to_mask, to_positions

BLOCKS = ((4, 4), (8, 8), (32, 32), (1, 16), (4, 1))
PATTERNS = (NM(2, 4), NM(1, 8), NM(7, 16), Strided(4), Strided(10))
SHAPES = ((1, 3), (37, 53), (64, 32), (16, 200), (130, 17))
"""(out, in): odd sizes, whole and broken blocks, wide and tall."""
DENSITIES = (0.0, 0.2, 1.0)
BATCHES = ((), (0,), (2,), (3, 7), (70,))
"""Leading dimensions of the input: none, empty, few, whole and broken panels."""
CONVOLUTIONS: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((8, 5, 3, 3), (7, 9), {"padding": 1}),
    ((17, 6, 1, 1), (14, 14), {}),
    ((6, 3, 1, 1), (15, 11), {"stride": 2}),
    ((5, 4, 3, 5), (13, 40), {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2)}),
    ((4, 2, 3, 5), (9, 9), {"padding": "same", "dilation": (3, 1)}),
    ((6, 2, 3, 3), (8, 12), {"groups": 3, "padding": 2, "stride": 2}),
    ((6, 1, 3, 3), (8, 12), {"groups": 6, "padding": 1}),
    ((7, 3, 5), (50,), {"padding": 2, "stride": 2}),
)
"""(Shape of the weight, size of the images, arguments) of convolutions in one and two dimensions."""
SAMPLES = ((), (1,), (3,))
"""Leading dimensions of the images; without one there is one image."""
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_ROWS = (
    {"constant_fan_in": False, "empty_rows": True},
    {"constant_fan_in": True, "empty_rows": False},
    {"constant_fan_in": True, "empty_rows": True},
)


def assert_close(actual: Tensor, expected: Tensor, allowed: float, scale: float | None = None) -> None:
    """AssertionError unless shapes agree and `actual` is finite and within `allowed` of `expected`.

    Bounded are the largest difference relative to `scale`, by default the largest expected entry, and its
    root mean square relative to the same.  A good `scale` is the largest sum of the magnitudes added.
    """
    assert actual.shape == expected.shape, (
        f"expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    )
    if expected.numel() == 0:
        return
    difference = actual.double() - expected.double()
    scale = max(expected.abs().max().item() if scale is None else scale, torch.finfo(torch.float64).tiny)
    largest = difference.abs().max().item() / scale
    assert isfinite(largest), "expected finite entries"
    mean = difference.norm().item() / sqrt(difference.numel()) / scale
    assert largest <= allowed, f"largest relative error {largest:.2e}, allowed {allowed:.2e}"
    assert mean <= allowed / 2, f"RMS relative error {mean:.2e}, allowed {allowed / 2:.2e}"


def sparse_weight(
    shape: tuple[int, int], density: float, *, constant_fan_in: bool = False, empty_rows: bool = True
) -> Tensor:
    """A dense fp64 weight with zeros in it, the same for the same arguments.

    With `constant_fan_in` every row has as many nonzeros; with `empty_rows` the first and others have none below
    density 1.
    """
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(shape, generator=generator, dtype=torch.float64)
    lowest = score.argsort(1).argsort(1) < round(density * shape[1])
    mask = lowest if constant_fan_in else score < density
    if empty_rows:
        mask[:: max(2, shape[0] // 3)] &= density == 1
    return torch.randn(shape, generator=generator, dtype=torch.float64) * mask


def problem_of(
    kernel: Kernel,
    weight: Tensor,
    batch: int,
    dtype: torch.dtype,
    training: bool,
    arguments: Mapping[str, Any] | None = None,
) -> Problem:
    """The problem of applying `weight` to `batch` rows, or output pixels, on its device."""
    mask = weight.flatten(1) != 0
    fan_in = condensed.fan_in(mask)
    shape, nnz = tuple(weight.shape), int(mask.sum())
    given, flat = tuple((arguments or {}).items()), weight.dim() == 2
    blocked = flat and bsr.block_of(mask) != (1, 1)
    group, strides = (nm.group_of(mask), strided.strides_of(mask)) if flat else (None, None)
    device, values = weight.device, kernel.values
    return Problem(
        kernel.op, shape, batch, nnz, dtype, device, training, fan_in, given, blocked, values, group, strides
    )


def check_kernel(kernel: Kernel, device: str = "cpu") -> int:
    """Hold `kernel` against the masked dense product in fp64 on `device`; returns how many problems it took on.

    Outputs and, in training, the gradients of the input, of the stored entries and of the bias, from random
    upstream gradients; for kernel and reference; over shapes, densities, batches and dtypes, non-contiguous
    inputs, and memory that is NaN until written.  AssertionError on the first difference, or if every problem
    was refused.
    """
    ran = 0
    for weight, size, arguments in _problems(kernel.op):
        weight = weight.to(device)
        for dtype, training in itertools.product(DTYPES, (False, True)):
            outputs = _dense(torch.empty(size, device="meta"), weight.to("meta"), None, arguments).numel()
            problem = problem_of(kernel, weight, outputs // len(weight), dtype, training, arguments)
            reasons = kernel.refuses(problem)
            assert all(isinstance(reason, str) and reason for reason in reasons), reasons
            if not reasons:
                _check_problem(kernel, weight.to(dtype), size, training, arguments)
                ran += 1
    assert ran, f"{kernel.name} refused every problem"
    return ran


def _problems(op: str) -> Iterator[tuple[Tensor, tuple[int, ...], dict[str, Any]]]:
    """(Weight in fp64, shape of the input, arguments of the kernel)."""
    if op == "linear":
        for shape, density, batch, rows in itertools.product(SHAPES, DENSITIES, BATCHES, _ROWS):
            yield sparse_weight(shape, density, **rows), (*batch, shape[1]), {"in_features": shape[1]}
        for block, density, batch in itertools.product(BLOCKS, DENSITIES, BATCHES):
            kept = (sparse_weight((5, 3), density) != 0).double().kron(torch.ones(block, dtype=torch.float64))
            size = (*batch, 3 * block[1])
            weight = kept * sparse_weight((5 * block[0], 3 * block[1]), 1.0)
            yield weight, size, {"in_features": size[-1]}
        for pattern, batch in itertools.product(PATTERNS, BATCHES):
            score, size = sparse_weight((37, 3 * pattern.m), 1.0), (*batch, 3 * pattern.m)
            yield score * pattern.project(score, 0), size, {"in_features": size[-1]}
        return
    for (shape, size, given), density, samples in itertools.product(CONVOLUTIONS, DENSITIES, SAMPLES):
        weight = sparse_weight((shape[0], prod(shape[1:])), density).view(shape)
        channels = shape[1] * given.get("groups", 1)
        yield (
            weight,
            (*samples, channels, *size),
            {"kernel_size": shape[2:], "in_channels": channels, **given},
        )


def _check_problem(
    kernel: Kernel, weight: Tensor, size: tuple[int, ...], training: bool, arguments: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*size[:-1], 2 * size[-1], generator=generator).to(weight)[..., ::2]
    bias = torch.randn(len(weight), generator=generator).to(weight)
    upstream = torch.randn(_dense(x, weight, bias, arguments).shape, generator=generator).to(weight)
    scale = _largest(_dense(x.abs(), weight.abs(), bias.abs(), arguments))
    _check_entries(kernel, weight)
    with poisoned_memory():
        for with_bias in (bias, None):
            if training:
                for run in (kernel.run, kernel.reference):
                    _check_gradients(kernel, run, weight, x, with_bias, upstream, arguments)
            else:
                _check_outputs(kernel, weight, x, with_bias, scale, arguments)


def _check_outputs(
    kernel: Kernel, weight: Tensor, x: Tensor, bias: Tensor | None, scale: float, arguments: dict[str, Any]
) -> None:
    buffers = kernel.pack(weight).values()
    exact = _dense(x, stored(kernel, weight), bias, arguments)
    allowed = tolerance(weight.dtype, prod(weight.shape[1:]) + 1)
    # Kernels fuse bias and activation; a reference whose activation is right with a bias has it right without.
    of_reference = ACTIVATIONS[:1] if bias is None else ACTIVATIONS
    for run, activations in ((kernel.run, ACTIVATIONS), (kernel.reference, of_reference)):
        for activation in activations:
            y = run(x, bias, *buffers, activation=activation, **arguments)
            assert_close(y, activate(exact, activation), allowed, scale)


def _check_entries(kernel: Kernel, weight: Tensor) -> None:
    """What is packed from the nonzeros alone is what is packed from the dense weight."""
    if kernel.pack_entries is None:
        return
    mask = weight.flatten(1) != 0
    entries = Entries(weight.flatten(1)[mask], mask.nonzero().t().int(), tuple(weight.shape))
    expected, got = kernel.pack(weight), kernel.pack_entries(entries)
    assert list(expected) == list(got), f"{kernel.name}: expected buffers {list(expected)}, got {list(got)}"
    for name, tensor in expected.items():
        same = tensor.dtype == got[name].dtype and torch.equal(tensor, got[name])
        assert same, f"{kernel.name}: pack_entries makes another {name}"


def _check_gradients(
    kernel: Kernel,
    run: Callable[..., Tensor],
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
    upstream: Tensor,
    arguments: dict[str, Any],
) -> None:
    buffers = [tensor.clone() for tensor in kernel.pack(weight).values()]
    values = next(tensor for tensor in buffers if tensor.is_floating_point()).requires_grad_()
    leaves = [x.detach().requires_grad_(), values, *([] if bias is None else [bias.clone().requires_grad_()])]
    y = run(leaves[0], leaves[2] if bias is not None else None, *buffers, **arguments)
    gradients = torch.autograd.grad(y, leaves, upstream)

    exact, scales = (
        _dense_gradients(*tensors, arguments)
        for tensors in ((x, weight, bias, upstream), (x.abs(), weight.abs(), bias, upstream.abs()))
    )
    expected = (exact[0], _packed_like(kernel, exact[1], weight), *exact[2:])
    outputs = upstream.numel() // len(weight)
    terms = (weight.numel() // weight.shape[1], outputs, outputs)
    for got, right, scale, count in zip(gradients, expected, scales, terms, strict=False):
        assert_close(got, right, tolerance(x.dtype, count), _largest(scale))
    scale = _largest(_dense(x.abs(), weight.abs(), bias, arguments))
    allowed = tolerance(x.dtype, prod(weight.shape[1:]) + 1)
    assert_close(y, _dense(x, weight, bias, arguments), allowed, max(scale, _largest(y)))


def _dense_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor, arguments: dict[str, Any]
) -> tuple[Tensor, ...]:
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = _dense(leaves[0], leaves[1], leaves[2] if bias is not None else None, arguments)
    return torch.autograd.grad(y, leaves, upstream.double())


def _packed_like(kernel: Kernel, gradient: Tensor, weight: Tensor) -> Tensor:
    """The entries of a dense `gradient` where `kernel` stores those of `weight`; 0 where it stores a zero."""
    positions = torch.arange(1, weight.numel() + 1, dtype=torch.float64, device=weight.device).reshape(
        weight.shape
    )
    stored = next(iter(kernel.pack(torch.where(weight != 0, positions, 0)).values())).long()
    return torch.cat([gradient.new_zeros(1), gradient.reshape(-1)])[stored]


def _largest(magnitudes: Tensor) -> float:
    return magnitudes.abs().max().item() if magnitudes.numel() else 0.0


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    op: Any = {2: F.linear, 3: F.conv1d, 4: F.conv2d}[weight.dim()]
    given = {name: value for name, value in arguments.items() if name not in OF_THE_WEIGHT}
    return op(x.double(), weight.double(), None if bias is None else bias.double(), **given)


def check_pattern(pattern: Pattern, shape: Sequence[int], nnz: int, seed: int = 0) -> None:
    """Project, prune, regrow and stream scores of `shape` (one the pattern fits), random and tied ones."""
    generator = torch.Generator().manual_seed(seed)
    total = pattern.feasible(shape, nnz)
    assert pattern.feasible(shape, total) == total, f"{pattern}: feasible({total}) is not {total} itself"
    random = torch.rand(tuple(shape), generator=generator)
    coarse = torch.randint(0, 3, tuple(shape), generator=generator).float()
    for score in (random, coarse, torch.zeros(tuple(shape))):
        mask = pattern.project(score, nnz)
        assert mask.dtype == torch.bool, f"{pattern}: project gave {mask.dtype}"
        assert mask.shape == score.shape, f"{pattern}: project gave shape {list(mask.shape)}"
        assert int(mask.sum()) == total, (
            f"{pattern}: project gave {int(mask.sum())} ones, feasible says {total}"
        )
        pattern.check(mask)
        assert torch.equal(pattern.project(score, nnz), mask), f"{pattern}: project is not deterministic"
        _check_prune_and_regrow(pattern, score, mask, nnz)
        _check_tiles(pattern, score, mask, nnz)


def _check_prune_and_regrow(pattern: Pattern, score: Tensor, mask: Tensor, nnz: int) -> None:
    active = int(mask.sum())
    positions = to_positions(mask)
    for keep in {0, active // 3, active - 1 if active else 0, active}:
        short = pattern.prune(score[mask], positions, score.shape, keep)
        assert short.shape == positions.shape, f"{pattern}: prune gave shape {list(short.shape)}"
        assert int(short.sum()) <= keep, (
            f"{pattern}: prune kept {int(short.sum())}, at most {keep} were allowed"
        )
        kept = to_mask(positions[short], score.shape)
        regrown = pattern.project((1 - score).masked_fill(kept, torch.inf), nnz)
        assert bool((regrown | ~kept).all()), f"{pattern}: project dropped an entry with score +inf"
        assert int(regrown.sum()) == active, f"{pattern}: pruning and growing changed the count"
        pattern.check(regrown)


def _check_tiles(pattern: Pattern, score: Tensor, mask: Tensor, nnz: int) -> None:
    matrix = score.reshape(len(score), -1)
    for height in (1, 3, len(score)):
        tiles = [(first, matrix[first : first + height]) for first in range(0, len(score), height)]
        positions = pattern.project_tiles(tiles, score.shape, nnz)
        assert torch.equal(positions, to_positions(mask)), (
            f"{pattern}: tiles of {height} rows give another mask"
        )
