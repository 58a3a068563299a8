"""What Dynamo calls in the place of a graph: sparse while its weights are as they were packed, else dense."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fxsparse.report import Report

Call = Callable[..., Any]

REPACKED = 8
"""How often weights that changed are packed again; Dynamo compiles a frame as often."""


@dataclass(frozen=True)
class Watched:
    """A Parameter or buffer of the model as it was when weights were packed."""

    position: int
    """Among the inputs of Dynamo's graph."""
    tensor: ReferenceType[Tensor]
    address: int
    version: int
    """Writes that it had seen."""

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether the input is that tensor still, with the same values."""
        tensor = args[self.position]
        return (
            self.tensor() is tensor and tensor._version == self.version and tensor.data_ptr() == self.address
        )


def watch(position: int, tensor: Tensor) -> Watched:
    """Watch which tensor it is, what is written to it, and whether its ``.data`` is replaced."""
    return Watched(position, ref(tensor), tensor.data_ptr(), tensor._version)


def _stamp(tensor: Tensor) -> tuple[int, int, int]:
    """What changes when a tensor does; one of inference mode counts no writes, and is never packed."""
    return id(tensor), tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Packed:
    """A graph on packed weights."""

    call: Call
    inputs: tuple[int, ...]
    """Positions of what `call` takes."""
    watched: tuple[Watched, ...]

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether the weights that were packed are those of this call."""
        return all(watched.holds(args) for watched in self.watched)

    def run(self, args: Sequence[Any]) -> Any:
        """The outputs of the graph."""
        return self.call(*[args[position] for position in self.inputs])


class SwitchingGraph:
    """Runs a graph on packed weights as long as they are as they were, else its dense form.

    A call that finds them changed runs dense; one that finds them as the call before it did has them packed again, up
    to `REPACKED` times.  Where a gradient is asked for, the dense form computes it, and every later call.
    """

    def __init__(
        self, dense: Call, packed: Packed, pack: Callable[[Sequence[Any]], Packed | None], report: Report
    ) -> None:
        self.dense = dense
        self.pack = pack
        self.report = report
        self.left = REPACKED
        self.seen: tuple[Any, ...] = ()
        self.positions = [watched.position for watched in packed.watched]
        self.packed: Packed | None = None
        self._take(packed)

    def __call__(self, *args: Any) -> Any:
        """What Dynamo's graph returns for its inputs."""
        packed = self.current(args)
        return self.dense(*args) if packed is None else packed.run(args)

    def current(self, args: Sequence[Any]) -> Packed | None:
        """The packed graph for these inputs, if there is one."""
        packed = self.packed
        if packed is not None and packed.holds(args):
            return packed
        if self.left < 0:
            return None
        stamp = tuple(_stamp(args[position]) for position in self.positions)
        if stamp != self.seen:
            self.seen = stamp
            return None
        self.left -= 1
        again = self.pack(args) if self.left >= 0 else None
        self.report.notes.append(f"weights changed: {'packed again' if again else 'dense from now on'}")
        self._take(again)
        return again

    def differentiate(self) -> None:
        """Stay dense: a gradient was asked for."""
        if self.left >= 0:
            self.report.notes.append("a backward ran: dense from now on, so that no forward runs twice")
        self._take(None)

    def _take(self, packed: Packed | None) -> None:
        """Run this from now on, for as long as its weights live; for good the dense form where it is None."""
        self.packed = packed
        if packed is None:
            self.left = -1
            self.deaths = []
        else:
            tensors = [watched.tensor() for watched in packed.watched]
            self.deaths = [ref(tensor, self._let_go) for tensor in tensors if tensor is not None]

    def _let_go(self, _: object) -> None:
        self.packed = None


@dataclass(frozen=True)
class DifferentiableGraph:
    """A `SwitchingGraph` for calls whose outputs may be asked for gradients."""

    graph: SwitchingGraph
    differentiable: tuple[bool, ...]
    """Of each output."""

    def __call__(self, *args: Any) -> Any:
        """What Dynamo's graph returns for its inputs."""
        packed = self.graph.current(args)
        if packed is None:
            return self.graph.dense(*args)
        return _Forward.apply(self, packed, *args)


class _Forward(Function):
    """The packed graph, with the gradients of the dense one."""

    @staticmethod
    def forward(ctx: Any, graph: DifferentiableGraph, packed: Packed, *args: Any) -> Any:
        outputs = tuple(packed.run(args))
        ctx.graph = graph
        ctx.plain = [None if isinstance(value, Tensor) else value for value in args]
        ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in args])
        ctx.set_materialize_grads(False)
        pairs = zip(outputs, graph.differentiable, strict=True)
        ctx.mark_non_differentiable(
            *[out for out, differs in pairs if isinstance(out, Tensor) and not differs]
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        graph = ctx.graph
        graph.graph.differentiate()
        args = list(ctx.plain)
        for k, tensor in enumerate(ctx.saved_tensors):
            if tensor is not None:
                args[k] = tensor.detach().requires_grad_(ctx.needs_input_grad[k + 2])
        with torch.enable_grad():
            outputs = graph.graph.dense(*args)
        asked = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        wanted = [value for k, value in enumerate(args) if ctx.needs_input_grad[k + 2]]
        found = iter(_gradients(asked, wanted))
        return None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])


def _gradients(asked: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not asked:
        return [None] * len(wanted)
    outputs, grads = zip(*asked, strict=True)
    return torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
