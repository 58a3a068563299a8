"""Widen all channels of a network that may be, and write the sizes that its graphs spell out anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse.channels.dependency import Axis
from fxsparse.channels.resizing import UNKNOWN
from fxsparse.channels.widening import Widths, widen
from fxsparse.channels.written_sizes import rewrite_sizes
from fxsparse.errors import InvariantError
from fxsparse.fresh_values import drawn_like
from fxsparse.graph import canonical_names, sites
from fxsparse.pipeline import PassContext, Transformed
from fxsparse.trace.modules import is_transposed_linear
from fxsparse.transforms import SparseWide
from fxsparse.transforms.choices import no_layers
from fxsparse.transforms.iso_flop import density, widened, widening_sparsity


@dataclass(frozen=True)
class WidenChannels:
    """Sparse Wide (arXiv:2303.11525): parameters and buffers get new shapes, in place in the program's own tree.

    Names stay.  Channels that an op without a rule reads, that are inputs or outputs of the model or whose number the
    model's code has to know, keep their width; the weights that are left as they were stay dense, with the reason.
    Parameters are drawn from their old entries (`fxsparse.fresh_values`), weights times the root of fan-in before /
    after; buffers are repeated with their channels.

    Raises:
        PlanError: nothing can be widened; the message has the reasons.
    """

    name: ClassVar[str] = "widen-channels"
    after: ClassVar[tuple[str, ...]] = ("choose-layers",)
    preserves_function: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Rewrites the graphs of both modes at once; returns the calls and tensors that changed."""
        found, plan = ctx.transformed, ctx.plan
        if (
            found is None
            or plan is None
            or plan.sparsity is None
            or not isinstance(plan.transform, SparseWide)
        ):
            raise InvariantError("widen-channels runs after choose-layers, with a plan for SparseWide")
        if found.sparse:
            return 0
        graphs, sparsity = [graph for _, graph in ctx.program.distinct_graphs()], plan.sparsity
        widths = widen(
            graphs, lambda width: widened(width, sparsity), plan.transform.heads, partial(_rounded, sparsity)
        )
        rewrites = sum(rewrite_sizes(graph, widths) for graph in graphs)
        rewrites += _resize(ctx, graphs[0], widths, plan.seed)
        ctx.notes += [reason for reason in dict.fromkeys(widths.kept.values()) if reason.endswith(UNKNOWN)]
        _sort(ctx, graphs, found, widths)
        for graph in graphs:
            graph.recompile()
        return rewrites


def _sort(ctx: PassContext, graphs: Sequence[GraphModule], found: Transformed, widths: Widths) -> None:
    """Weights that did not change stay dense; the others become sparse."""
    for name in list(found.layers):
        reasons = [widths.reason(Axis(name, dim)) for dim in (0, 1)]
        if None in reasons:
            found.sparse.append(name)
        else:
            found.layers.remove(name)
            found.dense[name] = f"its widths stay: {reasons[0]}"
    if not found.sparse:
        raise no_layers(SparseWide(), found.dense, ctx.excluded)


def _rounded(sparsity: float, width: int) -> str:
    return (
        f"{width} times k = {float(density(sparsity)) ** -0.5:.6g} is rounded down to {width}, and the smallest "
        f"sparsity that widens it is {widening_sparsity(width):g}"
    )


def _resize(ctx: PassContext, gm: GraphModule, widths: Widths, seed: int) -> int:
    """New shapes for what the tree holds; returns how many tensors changed."""
    root, names = ctx.program.skeleton, canonical_names(gm)
    fan_ins = {str(site.weight.target): 0 if site.transposed else 1 for site in sites(gm)}
    made: dict[int, Tensor] = {}
    for path, module in root.named_modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            full = f"{path}.{leaf}" if path else leaf
            name = names.get(full, full)
            axes = [Axis(name, dim) for dim in range(tensor.dim())]
            if not any(widths.grows(axis) for axis in axes):
                continue
            if id(tensor) not in made:
                made[id(tensor)] = _value(tensor, axes, widths, seed, name, fan_ins.get(name))
            setattr(module, leaf, made[id(tensor)])
        _tell(module)
    return len(made)


def _value(
    given: Tensor, axes: Sequence[Axis], widths: Widths, seed: int, name: str, fan_in: int | None
) -> Tensor:
    """`fan_in`: the dimension of a layer's weight along which it sums."""
    shape = tuple(widths.new(axis, size) for axis, size in zip(axes, given.shape, strict=True))
    if isinstance(given, nn.Parameter):
        scale = 1.0 if fan_in is None else (given.shape[fan_in] / shape[fan_in]) ** 0.5
        return nn.Parameter(drawn_like(given, shape, scale, seed, name), given.requires_grad)
    if given.is_meta:
        return torch.empty(shape, dtype=given.dtype, device="meta")
    for dim, axis in enumerate(axes):
        if widths.grows(axis):
            given = given.repeat_interleave(torch.from_numpy(widths.repeats(axis)).to(given.device), dim)
    return given


def _tell(module: nn.Module) -> None:
    """What a module says of its own sizes; LayerNorm computes with it, and a reset draws by it."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        if module.groups != 1:  # groups of one width, and more of them
            module.groups = module.groups * weight.shape[0] // module.out_channels
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif is_transposed_linear(module):
        module.nx, module.nf = weight.shape
