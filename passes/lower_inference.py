"""Replace dense ops by the selected kernels, on packed weights."""

from collections.abc import Sequence
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

    A PackedWeight takes the place of w in the skeleton, unless the kernel is a dense one, which reads w itself.
    """

    name: ClassVar[str] = "lower-inference"
    after: ClassVar[tuple[str, ...]] = ("select-kernels", "round-values")
    preserves_function: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of lowered call sites."""
        lowered = 0
        for name, decision in ctx.decisions.items():
            found, entry = sites(gm, name), kernel.registered()[decision.kernel]
            if entry.name in kernel.PLAIN:
                continue
            lowered += len(found)
            if entry.format == "dense":
                for site in found:
                    _lower_dense(site, ctx.weights[name].shape, entry)
                continue
            weight = ctx.entries.get(name) or _matrix(gm, found[0])
            packed = PackedWeight(entry.name, tuple(weight.shape), kernel.packed(entry, weight))
            put_packed(ctx.program.skeleton, name, packed)
            for site in found:
                _lower(gm, site, name, packed, entry)
        if lowered:
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


def _lower_dense(site: Site, shape: Sequence[int], entry: kernel.Kernel) -> None:
    node = site.node
    x, weight, bias = (argument(node, k, name) for k, name in enumerate(("input", "weight", "bias")))
    replace(node, entry.run, (x, bias, weight), **site_arguments(site, shape))


def _attribute(gm: GraphModule, name: str, before: Node) -> Node:
    known = attribute_nodes(gm.graph, name)
    return known[0] if known else insert_get_attr(gm.graph, name, before)
