"""What the ops of sparse weights read on calibration batches, summed up one weight at a time."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from fxsparse.errors import NumericsError, PlanError, TraceError
from fxsparse.graph import CONVOLUTION, Site, argument, given_arguments
from fxsparse.inputs import named_arguments

_CHUNK = 2**22
"""Entries of the windows of a convolution that are made at a time, at least those of one sample."""

Rows = tuple[int, int]
"""First row of a weight, and the one behind the last."""


def batches_of(model: nn.Module, calibration: Iterable[Any]) -> list[Any]:
    """The batches of an iterable, which is read once; PlanError for what is none, or has none that `model` takes."""
    if isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise PlanError(
            f"prune: expected calibration as an iterable of batches, got {type(calibration).__name__}; of one batch x "
            "it is [x]."
        )
    batches = list(calibration)
    if not batches:
        raise PlanError("prune: expected at least one calibration batch, got none; was the iterator used up?")
    for k, batch in enumerate(batches):
        try:
            named_arguments(model, batch)
        except TraceError as error:
            raise PlanError(
                f"prune: calibration batch {k} is not what the model is called with: {error}.  Of a loader of inputs "
                "and labels, pass (inputs for inputs, _ in loader)."
            ) from error
    return batches


@dataclass(frozen=True)
class Call:
    """One op on one weight: which rows it reads, and how their columns are the columns of a matrix of inputs."""

    site: Site
    rows: tuple[Rows, ...]
    """Pieces of the weight that have inputs of their own: the groups of a convolution, or the part that is read."""
    arguments: dict[str, Any]
    """Of a convolution, after input, weight and bias."""

    def output(self, x: Tensor, matrix: Tensor) -> Tensor:
        """What the op makes of `x` with `matrix` [rows, ...] in the place of the whole parameter, without a bias."""
        value = matrix.t() if self.site.transposed else matrix
        op: Any = self.site.node.target
        return op(x, _read(self.site, value), None, **self.arguments)


def call_of(site: Site, shape: Sequence[int]) -> Call | str:
    """How a call site reads its weight of the logical `shape` [rows, ...]; in words why it cannot be told."""
    if site.op.startswith("conv_transpose"):
        return f"{site.op} adds up its products over rows"
    arguments = given_arguments(site.node, CONVOLUTION if site.op != "linear" else ())
    if arguments is None:
        return f"the graph computes an argument of {site.op}"
    if not site.sliced:
        groups = int(arguments.get("groups", 1))
        step = shape[0] // groups
        return Call(site, tuple((first, first + step) for first in range(0, shape[0], step)), arguments)
    numbers = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(*shape)
    read = _read(site, numbers.t() if site.transposed else numbers)
    first, last = int(read.flatten()[0]), int(read.flatten()[-1]) + 1
    if read.shape != (last - first, *shape[1:]):
        return "an op reads a part of it that is not some rows next to each other"
    return Call(site, ((first, last),), arguments)


@dataclass
class Moments:
    """Sums over the inputs of one weight: of the squares of each column, or of the products of all pairs."""

    shape: tuple[int, ...]
    products: bool
    sums: dict[Rows, Tensor] = field(default_factory=dict)
    """For each piece of the weight [fan-in] in float64, or [fan-in, fan-in] in float32 (float64 for such inputs)."""
    count: dict[Rows, int] = field(default_factory=dict)
    """How many inputs it saw: tokens, or windows of a convolution."""

    def add(self, call: Call, x: Tensor) -> None:
        """Take in what the op is about to read."""
        with torch.autocast(x.device.type, enabled=False):
            for part in _inputs(call, x, self.shape):
                for rows, inputs in zip(call.rows, part, strict=True):
                    self._add(rows, inputs)

    def mean(self, rows: Rows) -> Tensor | None:
        """Over the inputs of a piece; None where it saw none.

        Raises:
            NumericsError: the inputs hold inf or NaN.
        """
        if not self.count.get(rows):
            return None
        found = self.sums[rows] / self.count[rows]
        if not bool(found.isfinite().all()):
            raise NumericsError(
                "expected finite inputs on the calibration batches, got inf or NaN, or numbers whose squares are; look "
                "for the batch, or the layer before, that makes them."
            )
        return found

    def _add(self, rows: Rows, inputs: Tensor) -> None:
        """`inputs`: [n, fan-in]."""
        self.count[rows] = self.count.get(rows, 0) + len(inputs)
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        if rows not in self.sums:
            size = wide.shape[1:] * 2 if self.products else wide.shape[1:]
            self.sums[rows] = wide.new_zeros(size, dtype=wide.dtype if self.products else torch.float64)
        if self.products:
            self.sums[rows].addmm_(wide.t(), wide)
        else:
            self.sums[rows] += wide.square().sum(0, dtype=torch.float64)


def to_matrix(weight: Tensor) -> Tensor:
    """[rows, fan-in] of a weight, the input channels of a kernel position next to each other, as patterns read it."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The weight of `shape` that `to_matrix` made `matrix` of."""
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _inputs(call: Call, x: Tensor, shape: Sequence[int]) -> Iterator[list[Tensor]]:
    """Some inputs at a time for each piece of `call`, [n, fan-in]."""
    if call.site.op == "linear":
        yield [x.reshape(-1, x.shape[-1])]
        return
    x = x if x.dim() == len(shape) else x.unsqueeze(0)
    windows = _windows(x, shape[2:], call.arguments)
    groups = len(call.rows)
    per_sample = max(1, windows[:1].numel())
    for part in windows.split(max(1, _CHUNK // per_sample)):
        # [n, channels, *positions, *kernel] -> for each group [n * positions, kernel * channels]
        spread = part.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1)
        yield list(spread.reshape(groups, -1, prod(shape[1:])))


def _windows(x: Tensor, kernel: Sequence[int], arguments: dict[str, Any]) -> Tensor:
    """What a convolution with a kernel of this size multiplies: a view [n, channels, *positions, *kernel]."""
    stride, dilation = (_each(arguments.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    spans = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    padding = arguments.get("padding", 0)
    if padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, len(kernel))]
    x = F.pad(x, list(itertools.chain(*reversed(sides))))
    for axis, (span, step, every) in enumerate(zip(spans, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, span + 1, step)[..., ::every]
    return x


def _each(value: Any, count: int) -> tuple[int, ...]:
    """An argument of a convolution for every dimension."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * count if len(values) == 1 else values


def _read(site: Site, value: Tensor) -> Tensor:
    """What the op of a call site reads of `value` in the place of its parameter: transposed, cut."""

    def at(node: Node) -> Any:
        if node is site.weight:
            return value
        source, *rest = node.args
        assert isinstance(source, Node)
        if node.op == "call_method":
            return getattr(at(source), str(node.target))(*rest, **node.kwargs)
        assert callable(node.target)
        return node.target(at(source), *rest, **node.kwargs)

    return at(argument(site.node, 1, "weight"))
