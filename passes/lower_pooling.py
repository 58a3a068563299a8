"""Run max pooling without the indices that torch's kernel finds on the way, where that is faster."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import kernel
from fxsparse.graph import fetch, replace
from fxsparse.inputs import has_meta
from fxsparse.passes.select_kernels import ADVANTAGE, site_inputs
from fxsparse.pipeline import PassContext
from fxsparse.timing import interleaved_quartiles

_NAMES = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_CALLS = (F.max_pool2d, torch.max_pool2d, torch.ops.aten.max_pool2d.default)


@dataclass(frozen=True)
class LowerPooling:
    """``F.max_pool2d`` becomes fxsparse's, where it measured faster on the inputs that the call really gets."""

    name: ClassVar[str] = "lower-pooling"
    after: ClassVar[tuple[str, ...]] = ("functionalize",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of lowered calls; none without example inputs, as nothing can be measured."""
        if ctx.program.tier == "walk" or ctx.example_inputs is None or has_meta(ctx.example_inputs):
            return 0
        found = {node: given for node in gm.graph.nodes if (given := _arguments(gm, node)) is not None}
        inputs, lowered = site_inputs(gm, ctx, list(found)), 0
        for node, given in found.items():
            if _is_faster(inputs[node], given):
                replace(node, kernel.glue("max_pool2d"), (node.args[0],), **given)
                lowered += 1
        return lowered


def _arguments(gm: GraphModule, node: Node) -> dict[str, Any] | None:
    """What a max pooling is called with besides its input; None for another node, or where indices are wanted."""
    if node.op == "call_module":
        module = fetch(gm, str(node.target))
        if type(module) is not nn.MaxPool2d or module.return_indices or node.kwargs or len(node.args) != 1:
            return None
        return {name: getattr(module, name) for name in _NAMES}
    if node.op != "call_function" or node.target not in _CALLS or not node.args:
        return None
    given = dict(zip(_NAMES, node.args[1:], strict=False)) | dict(node.kwargs)
    if given.pop("return_indices", False) or not set(given) <= set(_NAMES):
        return None
    if given.get("stride") == []:
        del given["stride"]
    return None if any(isinstance(value, Node) for value in given.values()) else given


def _is_faster(x: Tensor, given: dict[str, Any]) -> bool:
    if x.dtype != torch.float32 or not x.is_cpu:
        return False
    with torch.no_grad():
        ours = kernel.glue("max_pool2d")
        calls = {"torch": lambda: F.max_pool2d(x, **given), "ours": lambda: ours(x, **given)}
        if not torch.equal(*(call() for call in calls.values())):
            return False
        times = interleaved_quartiles(calls, rounds=21, seconds=0.5)
    return times["ours"] <= ADVANTAGE * times["torch"]
