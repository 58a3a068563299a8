"""Replace dense ops by the selected kernels, on packed weights."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import kernel
from fxsparse.graph import (
    Site,
    argument,
    attribute_nodes,
    eliminate_dead_code,
    fetch,
    insert_get_attr,
    replace,
    site_arguments,
    sites,
)
from fxsparse.packed import PackedWeight, put_packed
from fxsparse.pipeline import PassContext


@dataclass(frozen=True)
class LowerInference:
    """A linear or convolution of (x, w, b) becomes ``kernel.run(x, b, *buffers, **site_arguments)``.

    A PackedWeight takes the place of w in the skeleton.
    """

    name: ClassVar[str] = "lower-inference"
    after: ClassVar[tuple[str, ...]] = ("select-kernels",)
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of lowered call sites."""
        lowered = 0
        for name, decision in ctx.decisions.items():
            if decision.format == "dense":
                continue
            found, entry = sites(gm, name), kernel.registered()[decision.kernel]
            weight = ctx.entries.get(name) or _matrix(gm, found[0])
            packed = PackedWeight(entry.name, tuple(weight.shape), kernel.packed(entry, weight))
            put_packed(ctx.program.skeleton, name, packed)
            for site in found:
                _lower(gm, site, name, packed, entry)
            lowered += len(found)
            eliminate_dead_code(gm.graph)
        return lowered


def _matrix(gm: GraphModule, site: Site) -> Tensor:
    weight = fetch(gm, str(site.weight.target)).detach()
    return weight.t().contiguous() if site.transposed else weight


def _lower(gm: GraphModule, site: Site, name: str, packed: PackedWeight, entry: kernel.Kernel) -> None:
    node = site.node
    buffers = [_attribute(gm, f"{name}.{buffer}", node) for buffer, _ in packed.named_buffers()]
    arguments = site_arguments(site, packed.shape)
    replace(node, entry.run, (argument(node, 0, "input"), argument(node, 2, "bias"), *buffers), **arguments)


def _attribute(gm: GraphModule, name: str, before: Node) -> Node:
    known = attribute_nodes(gm.graph, name)
    return known[0] if known else insert_get_attr(gm.graph, name, before)
