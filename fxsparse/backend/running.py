"""What Dynamo calls in the place of a graph: sparse while its weights are as they were packed, else dense."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.autograd import Function

from fxsparse.backend.by_weights import ByWeights
from fxsparse.errors import UnsupportedError
from fxsparse.report import Report

Call = Callable[..., Any]
Packer = Callable[[Sequence[Any], Report], "Packed | None"]

REPACKED = 8
"""How often weights that changed are packed again; Dynamo compiles a frame as often."""

SETS = 64
"""How many models that live at a time a graph tells apart."""

_TRAINED = "a backward ran with one set of Parameters: others that were not packed by then stay dense"

_OWN = 3
"""Arguments of `_Forward` before those of Dynamo's graph."""


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
    differentiable: tuple[bool, ...]
    """Of each output, whether a gradient may be asked for."""

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether the weights that were packed are those of this call."""
        return all(watched.holds(args) for watched in self.watched)

    def run(self, args: Sequence[Any]) -> Any:
        """The outputs of the graph."""
        return self.call(*[args[position] for position in self.inputs])


class WeightSet:
    """The weights of one model, packed as long as they are as they were.

    A call that finds them changed runs dense; one that finds them as the call before did has them packed again, up to
    `REPACKED` times.  Weights that are met after the graph was compiled are packed for the first time in the same way.

    Args:
        packed: None where the set is dense, for good (`left` = -1) or until it is packed.
        positions: of the weights and buffers among the inputs of Dynamo's graph.
        report: of these weights.
        left: how often they may be packed from now on; -1 keeps what they have.
    """

    def __init__(
        self, packed: Packed | None, positions: Sequence[int], report: Report, left: int = REPACKED
    ) -> None:
        self.positions = positions
        self.report = report
        self.left = left
        self.seen: tuple[Any, ...] = ()
        self.packed: Packed | None = None
        self.is_new = packed is None
        if packed is not None:
            self._take(packed)

    def is_steady(self, args: Sequence[Any]) -> bool:
        """Whether the call before had the same values, and packing them is allowed."""
        if self.left < 0:
            return False
        stamp = tuple([_stamp(args[position]) for position in self.positions])
        self.seen, before = stamp, self.seen
        return stamp == before

    def renew(self, packed: Packed | None) -> None:
        """Take what the weights of now were packed as; dense for good where it is None."""
        first = "other Parameters of a compiled graph" if self.is_new else "weights changed"
        again = "packed" if self.is_new else "packed again"
        self.report.notes.append(f"{first}: {'dense from now on' if packed is None else again}")
        self.left -= 1
        self.is_new = False
        self._take(packed)

    def stay_dense(self, reason: str) -> None:
        """Run dense from now on."""
        if self.left >= 0:
            self.report.notes.append(reason)
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


class SwitchingGraph:
    """Runs a graph on packed weights where the model that it is called for has them, else its dense form.

    Dynamo runs the graph of one model for every other of its class, so each set of Parameters is packed for itself: the
    first one while compiling, up to `SETS` that live at a time when they are met.  Where a gradient is asked for, the
    dense form computes it, and every later call with these weights; no set is packed for the first time from then on.

    Args:
        dense: the graph on any weights.
        sets: empty; its positions tell models apart.
        watched: positions of everything of a model.
        pack: of a call's inputs and the report to fill; None where dense is faster.
        report: of the first set.
    """

    def __init__(
        self, dense: Call, sets: ByWeights[WeightSet], watched: Sequence[int], pack: Packer, report: Report
    ) -> None:
        self.dense = dense
        self.sets = sets
        self.watched = watched
        self.pack = pack
        self.report = report
        self.trained = False

    def __call__(self, *args: Any) -> Any:
        """What Dynamo's graph returns for its inputs."""
        weights = self.sets.get(args) or self._meet(args)
        packed = None if weights is None else self._current(weights, args)
        if weights is None or packed is None:
            return self.dense(*args)
        if any(packed.differentiable):
            return _Forward.apply(self, weights, packed, *args)
        return packed.run(args)

    def start(self, args: Sequence[Any], packed: Packed | None) -> None:
        """Keep what the weights were packed as while the graph was compiled."""
        self.sets.put(args, WeightSet(packed, self.watched, self.report, -1 if packed is None else REPACKED))

    def differentiate(self, weights: WeightSet) -> None:
        """A gradient was asked for."""
        self.trained = True
        weights.stay_dense("a backward ran: dense from now on, so that no forward runs twice")

    def _meet(self, args: Sequence[Any]) -> WeightSet | None:
        if len(self.sets) >= SETS:
            self._note(f"{SETS} sets of Parameters share this graph: further ones run dense")
            return None
        self._note("other Parameters run this graph: each set is dense until two calls find it unchanged")
        return self.sets.put(args, WeightSet(None, self.watched, Report(), REPACKED + 1))

    def _note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)

    def _current(self, weights: WeightSet, args: Sequence[Any]) -> Packed | None:
        """The packed graph for these inputs, if there is one."""
        packed = weights.packed
        if packed is not None and packed.holds(args):
            return packed
        if not weights.is_steady(args):
            return None
        if weights.is_new and self.trained:
            weights.stay_dense(_TRAINED)
            self._note(_TRAINED)
            return None
        weights.renew(self.pack(args, weights.report) if weights.left else None)
        return weights.packed


class _Forward(Function):
    """The packed graph, with the gradients of the dense one."""

    @staticmethod
    def forward(ctx: Any, graph: SwitchingGraph, weights: WeightSet, packed: Packed, *args: Any) -> Any:
        outputs = tuple(packed.run(args))
        ctx.graph, ctx.weights = graph, weights
        ctx.plain = [None if isinstance(value, Tensor) else value for value in args]
        ctx.save_for_backward(*[value if isinstance(value, Tensor) else None for value in args])
        ctx.set_materialize_grads(False)
        pairs = zip(outputs, packed.differentiable, strict=True)
        ctx.mark_non_differentiable(
            *[out for out, differs in pairs if isinstance(out, Tensor) and not differs]
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "backend 'fxsparse': expected a backward with create_graph=False, got create_graph=True: gradients of "
                "a graph on kernels have no gradients of their own. Where the loss has gradients in it, call the model "
                "that is not compiled."
            )
        ctx.graph.differentiate(ctx.weights)
        args = list(ctx.plain)
        for k, tensor in enumerate(ctx.saved_tensors):
            if tensor is not None:
                args[k] = tensor.detach().requires_grad_(ctx.needs_input_grad[k + _OWN])
        with torch.enable_grad():
            outputs = ctx.graph.dense(*args)
        asked = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        wanted = [value for k, value in enumerate(args) if ctx.needs_input_grad[k + _OWN]]
        found = iter(_gradients(asked, wanted))
        return *[None] * _OWN, *(next(found) if needed else None for needed in ctx.needs_input_grad[_OWN:])


def _gradients(asked: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not asked:
        return [None] * len(wanted)
    outputs, grads = zip(*asked, strict=True)
    return torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
