"""Run a batch of images a few samples at a time, where that is faster: their activations then stay in the caches."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from fxsparse import kernel
from fxsparse.graph import fetch
from fxsparse.image_ops import ADDS, COPIES, MODULES, POINTWISE, POOLINGS
from fxsparse.inputs import has_meta, split_inputs
from fxsparse.passes.select_kernels import ADVANTAGE
from fxsparse.pipeline import PassContext
from fxsparse.sample_split import SampleSplit, samples_at_once
from fxsparse.timing import interleaved_quartiles

SAMPLES = (1, 2, 4)
"""How many samples at a time are tried."""


@dataclass(frozen=True)
class SplitSamples:
    """``forward`` of a network of convolutions sees so many samples at a time as measured fastest; joins the results.

    Only where every op is known to compute each sample by itself, whatever its values.
    """

    name: ClassVar[str] = "split-samples"
    after: ClassVar[tuple[str, ...]] = ("fuse-epilogue", "cleanup")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns 1 where batches are split."""
        x = _batch(gm, ctx)
        if x is None or not _each_sample_by_itself(gm):
            return 0
        times = _times(gm, x)
        best = min(times, key=times.__getitem__)
        if times[best] > ADVANTAGE * times[len(x)]:
            return 0
        _split(gm, best)
        ctx.notes.append(
            f"{best} of {len(x)} samples at once: {times[len(x)] / times[best]:.2f}x of whole batches"
        )
        return 1


def _batch(gm: GraphModule, ctx: PassContext) -> Tensor | None:
    """The only example input, if it is a batch of images on the CPU that a plain graph takes."""
    if ctx.program.tier == "walk" or ctx.example_inputs is None or has_meta(ctx.example_inputs):
        return None
    args, kwargs = split_inputs(ctx.example_inputs)
    if len(args) != 1 or kwargs or type(gm.graph._codegen) is not CodeGen:
        return None
    x = args[0]
    return x if isinstance(x, Tensor) and x.is_cpu and x.dim() == 4 and len(x) > 1 else None


def _each_sample_by_itself(gm: GraphModule) -> bool:
    """Whether every op takes and gives tensors whose first dimension is the batch."""
    convolutions = {entry.run for entry in kernel.registered().values() if entry.op == "conv2d"}
    linears = {F.linear} | {entry.run for entry in kernel.registered().values() if entry.op == "linear"}
    images, rows = convolutions | POOLINGS | {F.conv2d, torch.conv2d} | {kernel.glue("max_pool2d")}, linears
    batches: dict[Node, int] = {}  # their dimensions
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            batches[node] = 4
        elif node.op not in ("get_attr", "output"):
            dimensions = _dimensions(gm, node, batches, images, rows)
            if dimensions is None:
                return False
            batches[node] = dimensions
    return len(inputs) == 1 and gm.graph.output_node().args[0] in batches


def _dimensions(
    gm: GraphModule, node: Node, batches: dict[Node, int], images: set[Any], rows: set[Any]
) -> int | None:
    """Those of a node's result, where it has the batch as the first; None where that is not known."""
    given = [batches[source] for source in node.all_input_nodes if source in batches]
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or first not in batches or len(set(given)) != 1:
        return None
    (dimensions,) = set(given)
    if node.op == "call_module":
        return dimensions if dimensions == 4 and type(fetch(gm, str(node.target))) in MODULES else None
    if node.target in POINTWISE | COPIES or (node.target in images and dimensions == 4):
        return dimensions
    if node.target in rows:
        return dimensions
    if node.target in ADDS and len(given) == len(node.args) == 2 and not node.kwargs:
        return dimensions
    flattens = node.target in (torch.flatten, "flatten") and node.args[1:] == (1,) and not node.kwargs
    return 2 if flattens else None


def _split(gm: GraphModule, samples: int) -> None:
    gm.graph.set_codegen(SampleSplit(samples))
    gm.recompile()


def _times(gm: GraphModule, x: Tensor) -> dict[int, float]:
    """{samples at a time: microseconds of the batch}; all of them for len(x)."""
    split = {
        n: samples_at_once(n)(GraphModule.__call__) for n in (*[n for n in SAMPLES if n < len(x)], len(x))
    }
    with torch.no_grad():
        calls = {str(n): functools.partial(call, gm, x) for n, call in split.items()}
        taken = interleaved_quartiles(calls, rounds=7, seconds=3.0)
    return {int(n): us for n, us in taken.items()}
