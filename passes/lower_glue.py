"""Run ops without a weight, such as pooling and attention, in fxsparse's own form where that is faster."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import kernel
from fxsparse.glue import GLUE, GlueOp
from fxsparse.graph import replace
from fxsparse.inputs import has_meta
from fxsparse.passes.select_kernels import ADVANTAGE, call_inputs
from fxsparse.pipeline import PassContext
from fxsparse.timing import interleaved_quartiles


@dataclass(frozen=True)
class LowerGlue:
    """A call in `fxsparse.glue` becomes fxsparse's, where it measured faster on the inputs that the call really gets.

    Calls alike are measured once, with a note.
    """

    name: ClassVar[str] = "lower-glue"
    after: ClassVar[tuple[str, ...]] = ("functionalize",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of lowered calls; none without example inputs, as nothing can be measured."""
        if ctx.program.tier == "walk" or ctx.example_inputs is None or has_meta(ctx.example_inputs):
            return 0
        found = {
            node: (op, call)
            for node in gm.graph.nodes
            for op in GLUE
            if (call := op.read(gm, node)) is not None
        }
        inputs = call_inputs(gm, ctx, {node: call.inputs for node, (_, call) in found.items()})
        faster: dict[object, bool] = {}
        lowered = 0
        for node, (op, call) in found.items():
            key = op.name, repr(call.given), *((t.shape, t.stride(), t.dtype) for t in inputs[node])
            if key not in faster:
                faster[key] = _is_faster(op, inputs[node], call.given, ctx.notes)
            if faster[key]:
                _lower(gm, node, op)
                lowered += 1
        return lowered


def _lower(gm: GraphModule, node: Node, op: GlueOp) -> None:
    call = op.read(gm, node)  # once more: its inputs may have been lowered since
    assert call is not None
    replace(node, kernel.glue(op.name), call.inputs, **call.given)


def _is_faster(op: GlueOp, inputs: tuple[Tensor, ...], given: Mapping[str, Any], notes: list[str]) -> bool:
    first, ours = inputs[0], kernel.glue(op.name)
    if first.dtype != torch.float32 or not first.is_cpu:
        return False
    calls = {"torch": lambda: op.plain(*inputs, **given), "ours": lambda: ours(*inputs, **given)}
    with torch.no_grad():
        if not _same(calls["torch"](), calls["ours"](), op.error):
            notes.append(f"{op.name} of {_shapes(inputs)} stays torch's: fxsparse's result differs")
            return False
        times = interleaved_quartiles(calls, rounds=21, seconds=0.5)
    notes.append(f"{op.name} of {_shapes(inputs)}: {times['ours']:.1f} us, torch's {times['torch']:.1f}")
    return times["ours"] <= ADVANTAGE * times["torch"]


def _same(want: Tensor, got: Tensor, error: float) -> bool:
    """Whether two results are alike in values and, as views of them may follow, in memory."""
    if want.shape != got.shape or want.stride() != got.stride():
        return False
    if error == 0.0:
        return torch.equal(want, got)
    return bool(((want - got).abs().max() <= error * want.abs().max()).item()) if want.numel() else True


def _shapes(inputs: tuple[Tensor, ...]) -> str:
    return ", ".join(str(list(t.shape)) for t in inputs)
