"""A held graph on the kernels that measured fastest, and what Inductor makes of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, _inductor, nn
from torch.fx import GraphModule

from fxsparse.backend.attention import open_attention
from fxsparse.backend.held import HeldGraph, with_weights_folded
from fxsparse.errors import InvariantError
from fxsparse.graph import canonical_names, owner
from fxsparse.inference import infer_program
from fxsparse.module import SparseModule
from fxsparse.pipeline import Program
from fxsparse.timing import interleaved_quartiles
from fxsparse.verify import compare, copied_inputs, observe

Call = Callable[..., Any]

_ROUNDS, _SECONDS = 21, 3.0


def lower(held: HeldGraph) -> SparseModule:
    """What ``fxsparse.compile(mode="infer")`` makes of the graph; tensors that it left as they were share memory."""
    with torch.inference_mode(False), torch.no_grad(), _compiling(False):
        root = with_weights_folded(held)
        if open_attention(root):
            _check_same(held, root)
        program = Program("dynamo", root, {"eval": root})
        artefact = infer_program(root, program, None, (*held.examples, {}))
        _share(artefact, held)
    return artefact


def _check_same(held: HeldGraph, root: GraphModule) -> None:
    want, got = (observe(gm, gm, (*held.examples, {}), training=False) for gm in (held.root, root))
    if difference := compare(want, got):
        raise InvariantError(
            f"backend 'fxsparse': attention taken apart differs from the graph: {difference}"
        )


def is_changed(artefact: SparseModule) -> bool:
    """Whether it runs any kernel of ours, or fewer neurons than the graph that it was made from."""
    if artefact._emitted.program.tier == "walk":
        return False
    return any(row["kernel"] != "dense" or row.get("neurons_removed") for row in artefact.report.layers)


def by_inductor(gm: GraphModule, example_inputs: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    """`gm`, which may be edited, compiled by Inductor for calls with positional inputs."""
    with _compiling(True):
        return _inductor.compile(gm, list(example_inputs), dict(settings))


def times_us(calls: Mapping[str, Call], arguments: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Microseconds of each call on copies of its arguments, in turns and without gradients."""
    with torch.no_grad(), _compiling(False):
        ready = {name: partial(call, *_copies(arguments[name])) for name, call in calls.items()}
        for call in ready.values():
            call()
        return interleaved_quartiles(ready, rounds=_ROUNDS, seconds=_SECONDS)


def _copies(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return copied_inputs((*arguments, {}))[0]


def _share(artefact: SparseModule, held: HeldGraph) -> None:
    """Put an alias of the model's own tensor wherever the artefact has a copy of the same numbers."""
    theirs = held.tensors()
    for name in {*canonical_names(artefact), *(name for name, _ in artefact.named_buffers())}:
        module, leaf = owner(artefact, name)
        kept: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        if (mine := kept.get(leaf)) is not None and _is_same(mine, theirs.get(name)):
            # An alias: what holds a model's own Parameter would keep the model's memory alive.
            alias = theirs[name].detach()
            kept[leaf] = nn.Parameter(alias, False) if isinstance(mine, nn.Parameter) else alias


def _is_same(mine: Tensor, other: Tensor | None) -> bool:
    if (
        other is None
        or mine.shape != other.shape
        or mine.dtype != other.dtype
        or mine.stride() != other.stride()
    ):
        return False
    return torch.equal(mine, other.detach())


@contextmanager
def _compiling(on: bool) -> Iterator[None]:
    """Let ``torch.compiler.is_compiling()`` say so: kernels ask it which of their two forms to take."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = on
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
