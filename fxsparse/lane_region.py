"""The first part of a network of images, run in lanes a few samples at a time where an input suits."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.fx import GraphModule

from fxsparse.graph_pickle import FlatGraph, picklable, restored
from fxsparse.kernels.library import wants_gradient

_REGIONS: dict[str, "LaneRegion"] = {}
"""What `in_lanes` calls, as an op of PyTorch takes no module: one region of all that do the same, by what they do.

A graph that a compiler keeps on disk names what a region does, and no object of the process that compiled it.
"""


@torch.library.custom_op("fxsparse::lane_region", mutates_args=())
def in_lanes(x: Tensor, weights: Sequence[Tensor], what: str) -> Tensor:
    """A region of this process as one op, which a compiler leaves as it is; the result is contiguous."""
    return _REGIONS[what].in_stages(x, weights).contiguous()


@in_lanes.register_fake
def _(x: Tensor, weights: Sequence[Tensor], what: str) -> Tensor:
    return torch.empty_like(_REGIONS[what].plain(x, *weights), memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Stage:
    """Ops of ``(x, *weights)``, for so many samples at a time, whose parts of a `grid` are lanes.

    The first stage has x as images, the others as a list of what the one before gives for a few samples each, in lanes.
    """

    samples: int
    grid: int
    piece: GraphModule


class LaneRegion(nn.Module):
    """Stages one after the other, each for a few samples at a time, so that what is between them stays in caches.

    Inputs of another size than `size` [channels, height, width], of another dtype than fp32, and of a number of samples
    that does not fill the lanes run `plain`, the ops as they were, `at_once` samples at a time.  For torch.compile the
    region is one op; what torch.export sees are the ops as they were.  Weights are arguments: the region holds none.
    """

    def __init__(
        self, plain: GraphModule, at_once: int | None, stages: Sequence[Stage], size: Sequence[int]
    ) -> None:
        super().__init__()
        self.plain, self.at_once, self.size = plain, at_once, tuple(size)
        self.pieces = nn.ModuleList([stage.piece for stage in stages])
        self.plan = [(stage.samples, stage.grid) for stage in stages]
        self.samples = max(stage.samples for stage in stages)
        self._register()

    def _register(self) -> None:
        graphs = [(piece.code, list(map(repr, piece.children()))) for piece in (self.plain, *self.pieces)]
        self.what = hashlib.sha256(repr((graphs, self.plan, self.size)).encode()).hexdigest()[:24]
        _REGIONS[self.what] = self

    def forward(self, x: Tensor, *weights: Any) -> Tensor:
        """What `plain` computes, in one of the two ways."""
        if torch.compiler.is_compiling():
            tensors = all(isinstance(weight, Tensor) for weight in weights)
            # Not is_exporting(), which Dynamo of torch 2.11 takes for True.
            if torch.compiler._is_exporting_flag or not tensors or not self._suits(x):
                return self.plain(x, *weights)
            return in_lanes(x, list(weights), self.what)
        # Transforms of torch.func do not know ops that write over an argument, as those of the pieces may.
        if peek_interpreter_stack() is not None or not self._suits(x):
            return _some_at_once(self.plain, self.at_once or max(1, len(x)), x, weights)
        return self.in_stages(x, weights)

    def in_stages(self, x: Tensor, weights: Sequence[Any]) -> Tensor:
        """The stages, for an input that suits."""
        until_last = functools.partial(self._until, len(self.plan) - 1)
        return _some_at_once(until_last, self.samples, x, weights)

    def _until(self, stage: int, x: Tensor, *weights: Any) -> Tensor:
        """What a stage gives for the images that it takes at once."""
        piece = self.pieces[stage]
        if stage == 0:
            return piece(x, *weights)
        parts = x.split(self.plan[stage - 1][0])
        return piece([self._until(stage - 1, part, *weights) for part in parts], *weights)

    def _suits(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.shape[1:] != self.size or len(x) == 0 or len(x) % self.samples:
            return False
        if x.dtype != torch.float32 or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return False
        return not wants_gradient(x)

    def extra_repr(self) -> str:
        """The stages."""
        return ", ".join(f"{samples} at once in {grid} x {grid} parts" for samples, grid in self.plan)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs in a form that pickles."""
        state = {**self.__dict__, "_modules": {}}
        state["graphs"] = [_described(piece) for piece in (self.plain, *self.pieces)]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The opposite."""
        plain, *pieces = [GraphModule(held, restored(graph)) for held, graph in state.pop("graphs")]
        self.__dict__.update(state)
        self.plain, self.pieces = plain, nn.ModuleList(pieces)
        self._register()


def _described(piece: Any) -> tuple[dict[str, nn.Module], FlatGraph]:
    called = piece.graph.find_nodes(op="call_module")
    return {str(node.target): piece.get_submodule(str(node.target)) for node in called}, picklable(
        piece.graph
    )


def _some_at_once(piece: Callable[..., Tensor], samples: int, x: Tensor, weights: Sequence[Any]) -> Tensor:
    if samples >= len(x):
        return piece(x, *weights)
    return torch.cat([piece(part, *weights) for part in x.split(samples)])
