"""Which channels hold one number whatever the input, and which number: constants go through the graph op by op."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxsparse.channels.dependency import Axis
from fxsparse.channels.rules import Flow, Step
from fxsparse.channels.tracing import TracedChannels
from fxsparse.graph import argument, fetch


@dataclass(frozen=True)
class Constant:
    """Along one axis: which positions are the same number everywhere, and that number (elsewhere meaningless)."""

    values: Tensor
    known: Tensor


@torch.no_grad()
def constant_channels(gm: GraphModule, traced: TracedChannels) -> dict[Axis, Constant]:
    """{axis that carries outputs of a layer: its constant channels}, computed by the model's own ops in its dtype.

    A row of a weight without nonzeros gives its bias; activations, norms and reshapes take that further.  A product
    with a constant 0 is 0: inputs that make the other factor infinite or NaN are left out of account.
    """
    found: dict[Axis, Constant] = {}
    for node, step in traced.steps.items():
        if step.flow is None or node in traced.overwritten:
            continue
        for axis in _outputs(traced, node):
            constant = _FLOWS[step.flow](gm, found, node, step, axis)
            finite = constant.values.isfinite()
            found[axis] = Constant(constant.values.masked_fill(~finite, 0), constant.known & finite)
    return found


def pads(node: Node) -> bool:
    """Whether a convolution reads zeros beyond the border of its input."""
    padding = argument(node, 4, "padding") if node.target is not torch.nn.functional.linear else 0
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)


def evaluate(gm: GraphModule, node: Node) -> Tensor:
    """The value of a node that is computed from parameters alone."""
    if node.op == "get_attr":
        return fetch(gm, str(node.target)).detach()
    return _call(gm, node, lambda read: evaluate(gm, read))


def flat(weight: Tensor) -> Tensor:
    """A weight as ``[out, in, kernel positions]``."""
    return weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of these are taken in: fp64, complex for complex numbers."""
    return torch.promote_types(dtype, torch.float64)


def _outputs(traced: TracedChannels, node: Node) -> list[Axis]:
    value = node.meta.get("val")
    axes = [Axis(node, dim) for dim in range(value.dim() if isinstance(value, Tensor) else 0)]
    return [axis for axis in axes if axis in traced.carried]


def _copied(gm: GraphModule, found: dict[Axis, Constant], node: Node, step: Step, axis: Axis) -> Constant:
    value = node.meta["val"]
    size, device = int(value.shape[axis.dim]), value.device
    values = torch.zeros(size, dtype=value.dtype, device=device)
    known = torch.zeros(size, dtype=torch.bool, device=device)
    for tie in step.ties:
        if tie.b == axis and tie.a in found:
            source, a, b = found[tie.a], torch.from_numpy(tie.a_at), torch.from_numpy(tie.b_at)
            values[b], known[b] = source.values[a], source.known[a]
    if step.flow is Flow.ZEROS:
        known &= values == 0
    return Constant(values, known)


def _pointwise(gm: GraphModule, found: dict[Axis, Constant], node: Node, step: Step, axis: Axis) -> Constant:
    """Run the op on one entry of every channel, where a channel that is not known holds a 1."""
    rank, size = node.meta["val"].dim(), int(node.meta["val"].shape[axis.dim])
    operands = node.all_input_nodes
    if not all(isinstance(x.meta.get("val"), Tensor) for x in operands):
        return _nothing_known(node, axis)  # a number that the graph computes
    entries = {x: _entry(gm, found, x, axis.dim - rank, size) for x in operands}
    out = _call(gm, node, lambda x: _placed(entries[x].values, x, axis.dim - rank))
    known = torch.stack([entry.known.expand(size) for entry in entries.values()]).all(0)
    if str(getattr(node.target, "__name__", node.target)).strip("_").removeprefix("i").split(".")[0] == "mul":
        zeros = [(entry.known & (entry.values == 0)).expand(size) for entry in entries.values()]
        zero = torch.stack(zeros).any(0)
        return Constant(out.reshape(-1).expand(size).masked_fill(zero, 0), known | zero)
    return Constant(out.reshape(-1).expand(size), known)


def _entry(gm: GraphModule, found: dict[Axis, Constant], x: Node, dim: int, size: int) -> Constant:
    """What an operand holds along a dimension, counted from the last: `size` entries, or one if it is broadcast."""
    value = x.meta["val"]
    if x.op == "get_attr":
        tensor = evaluate(gm, x)
        moved = tensor.movedim(dim, 0) if -dim <= tensor.dim() else tensor.reshape(1, -1)
        rows = moved.reshape(len(moved), -1)
        return Constant(rows[:, 0].clone(), (rows == rows[:, :1]).all(1))
    constant = found.get(Axis(x, value.dim() + dim)) if -dim <= value.dim() else None
    if constant is not None and len(constant.values) == size:
        return Constant(constant.values.masked_fill(~constant.known, 1), constant.known)
    one = torch.ones(1, dtype=value.dtype, device=value.device)
    return Constant(one, torch.zeros(1, dtype=torch.bool, device=value.device))


def _placed(values: Tensor, x: Node, dim: int) -> Tensor:
    """The entries along a dimension of a tensor of the operand's rank that has size 1 otherwise."""
    rank = x.meta["val"].dim()
    shape = [1] * rank
    if -dim <= rank:
        shape[dim] = len(values)
    return values.clone().reshape(shape)


def _norm(gm: GraphModule, found: dict[Axis, Constant], node: Node, step: Step, axis: Axis) -> Constant:
    x: Any = argument(node, 0, "input")
    constant = found.get(Axis(x, 1))
    if axis.dim != 1 or constant is None:
        return _nothing_known(node, axis)
    at = 1 - x.meta["val"].dim()
    out = _call(gm, node, lambda read: _placed(constant.values, x, at) if read is x else evaluate(gm, read))
    return Constant(out.reshape(-1), constant.known)


def _product(gm: GraphModule, found: dict[Axis, Constant], node: Node, step: Step, axis: Axis) -> Constant:
    """A row whose nonzeros all read constants is constant; zeros at a border are the constant 0."""
    if axis != step.produces:
        return _nothing_known(node, axis)
    x, weight_node, bias = (argument(node, k, name) for k, name in enumerate(("input", "weight", "bias")))
    weight = flat(evaluate(gm, weight_node))
    groups = int(x.meta["val"].shape[_input_dim(x, axis, node)]) // weight.shape[1]
    source = found.get(Axis(x, _input_dim(x, axis, node)))
    if source is None:
        source = Constant(weight.new_zeros(groups * weight.shape[1]), weight.new_zeros((), dtype=torch.bool))
    usable = source.known & (torch.tensor(not pads(node)) | (source.values == 0))
    usable, values = usable.view(groups, 1, -1), source.values.to(wide(weight.dtype)).view(groups, 1, -1)
    matrix = weight.view(groups, -1, *weight.shape[1:])
    known = ~((matrix != 0).any(3) & ~usable).any(2).flatten()
    values = values.where(usable, 0)
    at = (values != 0).any(0).any(0)  # few columns, so that no copy of the whole weight is made
    summed = (matrix[:, :, at].sum(3, dtype=wide(weight.dtype)) * values[:, :, at]).sum(2).flatten()
    if isinstance(bias, Node):
        if bias.op != "get_attr":
            return _nothing_known(node, axis)
        summed = summed + evaluate(gm, bias)
    return Constant(summed.to(weight.dtype), known)


def _input_dim(x: Node, axis: Axis, node: Node) -> int:
    """The dimension of the input along which a product sums: the same as that of its outputs, counted from the last."""
    return x.meta["val"].dim() + axis.dim - node.meta["val"].dim()


def _nothing_known(node: Node, axis: Axis) -> Constant:
    value = node.meta["val"]
    size = int(value.shape[axis.dim])
    zeros = torch.zeros(size, dtype=value.dtype, device=value.device)
    return Constant(zeros, torch.zeros(size, dtype=torch.bool, device=value.device))


def _call(gm: GraphModule, node: Node, value_of: Callable[[Node], Any]) -> Tensor:
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


_FLOWS: dict[Flow, Callable[..., Constant]] = {
    Flow.COPY: _copied,
    Flow.ZEROS: _copied,
    Flow.POINTWISE: _pointwise,
    Flow.NORM: _norm,
    Flow.PRODUCT: _product,
}
