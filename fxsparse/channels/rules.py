"""What every op does to channels: which it lets through, where it sums over them, where it mixes or counts them."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from fxsparse.batch_norm import read_batch_norm
from fxsparse.channels.dependency import Axis, Contraction, Tie
from fxsparse.channels.reading import Reader, is_pointwise
from fxsparse.channels.shapes import coordinates, matched
from fxsparse.graph import SITE_OPS, argument, operand_of


class Flow(enum.Enum):
    """How a channel that is constant goes through an op."""

    COPY = enum.auto()
    ZEROS = enum.auto()
    """Only 0 stays constant: zeros are added at a border."""
    POINTWISE = enum.auto()
    NORM = enum.auto()
    PRODUCT = enum.auto()


@dataclass(frozen=True)
class Step:
    """What one node does to channels.  Axes of what it reads and of its output that nothing here names are stops."""

    ties: Sequence[Tie] = ()
    flow: Flow | None = None
    """None where nothing constant is known to come out."""
    contraction: Contraction | None = None
    produces: Axis | None = None
    """The axis along which the outputs of a linear layer or convolution lie."""
    stops: dict[Axis, str] = field(default_factory=dict)
    reason: str = ""
    """Why the axes without a tie stop."""
    silent: bool = False
    """The op reads nothing of what its arguments hold, so that of them only `stops` stop."""
    free: Sequence[Axis] = ()
    """Axes that nothing ties and nothing stops: those that are summed over, where only sizes matter."""


def step_of(reader: Reader, node: Node) -> Step:
    """What a node does to channels; everything stops at an op without a rule."""
    unknown = Step(reason=f"{title(reader, node)} is not known to keep channels apart")
    if node.op in ("placeholder", "output"):
        return Step(reason=f"it is an {'input' if node.op == 'placeholder' else 'output'} of the model")
    if node.op == "get_attr":
        return Step(silent=True)
    if any("val" not in x.meta for x in node.all_input_nodes):
        return Step(reason=f"what {title(reader, node)} reads has no known shape")
    norm = read_batch_norm(reader.gm, node)
    if norm is not None:
        return _batch_norm(reader, node, norm) or unknown
    name = reader.operation(node)
    rule = None if name is None else RULES.get(name)
    if rule is None and name is not None and is_pointwise(name):
        rule = _pointwise
    if rule is None or (rule not in _WITHOUT_OUTPUT and reader.shape(node) is None):
        # An op on numbers alone reads no channels.
        return unknown
    return rule(reader, node) or unknown


def title(reader: Reader, node: Node) -> str:
    """What a reason calls a node: its operation and name."""
    module = reader.module(node)
    if module is not None:
        return f"{type(module).__name__} {node.target}"
    return f"{reader.operation(node) or getattr(node.target, '__name__', node.target)} ({node.name})"


def _product(reader: Reader, node: Node) -> Step | None:
    x, weight, bias = (argument(node, k, name) for k, name in enumerate(("input", "weight", "bias")))
    if not isinstance(x, Node) or not isinstance(weight, Node) or not reader.is_fixed(weight):
        return None
    groups = 1 if node.target is torch.nn.functional.linear else argument(node, 6, "groups") or 1
    # A linear layer's channels come last; a convolution's before as many dimensions as its kernel has.
    at = -1 if reader.rank(weight) == 2 else 1 - reader.rank(weight)
    leading = range(-reader.rank(x), at)
    ties = [tie for dim in leading for tie in reader.tie(x, dim, node, dim)]
    ties += reader.tie(weight, 0, node, at)
    if reader.size(x, at) is None or reader.size(node, at) is None:
        return None
    if isinstance(bias, Node):
        if reader.size(bias, 0) != reader.size(node, at):
            return None
        ties += reader.tie(bias, 0, node, at)
    reason = f"{title(reader, node)} slides over it"
    if groups != 1:
        ties += _whole_groups(reader, x, node, at, int(groups))
        return Step(ties, Flow.PRODUCT, produces=reader.axis(node, at), reason=reason)
    contraction = Contraction(node, reader.axis(x, at), reader.axis(weight, 1))
    return Step(ties, Flow.PRODUCT, contraction, reader.axis(node, at), reason=reason)


def _whole_groups(reader: Reader, x: Node, node: Node, at: int, groups: int) -> list[Tie]:
    """A grouped convolution needs groups of one size, so inputs and outputs of a group go together."""
    inputs, outputs = reader.size(x, at), reader.size(node, at)
    if inputs is None or outputs is None:
        return []
    every_in, every_out = np.arange(inputs), np.arange(outputs)
    first_out = every_in // (inputs // groups) * (outputs // groups)
    first_in = every_out // (outputs // groups) * (inputs // groups)
    a, b = reader.axis(x, at), reader.axis(node, at)
    return [Tie(a, b, every_in, first_out), Tie(a, b, first_in, every_out)]


def _batch_norm(reader: Reader, node: Node, norm: Any) -> Step | None:
    """Each channel is normed alone; by the statistics of a batch, as in training, none may go alone."""
    if norm.refusal is not None:
        return None
    ties = _same(reader, argument(node, 0, "input"), node)
    for name in norm.names.values():
        ties += reader.tie_tensor(name, node, 1)
    if norm.training or norm.names["running_mean"] is None:
        reason = f"{title(reader, node)} takes statistics of the batch"
        return Step(ties, stops={reader.axis(node, dim): reason for dim in range(reader.rank(node))})
    return Step(ties, Flow.NORM)


def _pointwise(reader: Reader, node: Node) -> Step:
    operands = [x for x in node.all_input_nodes if reader.shape(x) is not None]
    ties = [tie for x in operands for tie in _same(reader, x, node)]
    return Step(ties, Flow.POINTWISE, reason=f"{title(reader, node)} broadcasts it")


def _same(reader: Reader, x: Node, node: Node) -> list[Tie]:
    """Ties of the dimensions of an operand that are not broadcast, aligned from the last."""
    dims = range(-min(reader.rank(x), reader.rank(node)), 0)
    return [tie for dim in dims for tie in reader.tie(x, dim, node, dim)]


def _pool(reader: Reader, node: Node) -> Step:
    x, name = argument(node, 0, "input"), reader.operation(node) or ""
    spatial = int(name[-2])
    ties = [tie for dim in range(-reader.rank(x), -spatial) for tie in reader.tie(x, dim, node, dim)]
    flow = Flow.COPY
    if name.startswith("avg_pool"):
        padding = reader.setting(node, 3, "padding", 0)
        padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
        zeros_count = padded and reader.setting(node, 5, "count_include_pad", True)
        flow = Flow.ZEROS if zeros_count or reader.setting(node, 6, "divisor_override") else flow
    return Step(ties, flow, reason=f"{title(reader, node)} slides over it")


def _mean(reader: Reader, node: Node) -> Step | None:
    x, dims = argument(node, 0, "input"), argument(node, 1, "dim")
    rank = reader.rank(x)
    if dims is None or not isinstance(x, Node):
        return None
    gone = {dim % rank for dim in (dims if isinstance(dims, tuple | list) else (dims,))}
    left = [dim for dim in range(rank) if dim not in gone]
    after = left if reader.rank(node) == rank else range(len(left))  # keepdim or not
    ties = [tie for a, b in zip(left, after, strict=True) for tie in reader.tie(x, a, node, b)]
    return Step(ties, Flow.COPY, reason=f"{title(reader, node)} runs over it")


def _reshape(reader: Reader, node: Node) -> Step | None:
    x, after = argument(node, 0, "input"), reader.shape(node)
    before = reader.shape(x)
    groups = None if before is None or after is None else matched(before, after)
    if groups is None or before is None or after is None or x.meta["val"].dtype != node.meta["val"].dtype:
        return None
    ties: list[Tie] = []
    for inside, outside in groups:
        if len(outside) != 1 or _is_computed(node, outside[0]):
            continue
        if len(inside) == 1:
            ties += reader.tie(x, inside[0], node, outside[0])
            continue
        carriers = [k for k, dim in enumerate(inside) if reader.axis(x, dim) in reader.carried]
        sizes = [before[dim] for dim in inside]
        if len(carriers) == 1 and all(isinstance(size, int) for size in sizes):
            at = coordinates(sizes, carriers[0])
            a, b = reader.axis(x, inside[carriers[0]]), reader.axis(node, outside[0])
            ties.append(Tie(a, b, at, np.arange(len(at))))
    return Step(ties, Flow.COPY, reason=f"{title(reader, node)} cuts it up or merges it")


def shape_arguments(node: Node) -> list[Any] | None:
    """The sizes that a view or reshape asks for, as its call has them; None for an op that takes none."""
    if str(getattr(node.target, "__name__", node.target)).partition(".")[0] not in ("view", "reshape"):
        return None
    given = node.args[1:] or (argument(node, 1, "shape") or argument(node, 1, "size"),)
    return list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else list(given)


def _is_computed(node: Node, dim: int) -> bool:
    """Whether a reshape is asked for a size that the graph computes."""
    sizes = shape_arguments(node)
    if sizes is None:
        return False
    all_at_once = len(sizes) == 1 and isinstance(sizes[0], Node)  # x.view(x.size()[:-1] + (n,))
    return all_at_once or isinstance(sizes[dim], Node)


def _permute(reader: Reader, node: Node) -> Step | None:
    x = argument(node, 0, "input")
    if not isinstance(x, Node):
        return None
    sizes = range(2, 2 + reader.rank(x))  # all different, so that they tell where each went
    with torch.device("meta"):
        example = torch.empty(tuple(sizes))
    args, kwargs = (example, *node.args[1:]), {k: v for k, v in node.kwargs.items() if v is not x}
    call: Any = getattr(example, str(node.target)) if node.op == "call_method" else node.target
    moved = call(*args[1:], **kwargs) if node.op == "call_method" else call(*args, **kwargs)
    ties = [tie for k, size in enumerate(moved.shape) for tie in reader.tie(x, size - 2, node, k)]
    return Step(ties, Flow.COPY)


def _cat(reader: Reader, node: Node) -> Step | None:
    operands = argument(node, 0, "tensors")
    dim = (argument(node, 1, "dim") or 0) % max(1, reader.rank(node))
    ties: list[Tie] = []
    start = 0
    for x in operands:
        for k in range(reader.rank(x)):
            ties += reader.tie(x, k, node, k) if k != dim else []
        size = reader.size(x, dim)
        if size is None:
            return None
        every = np.arange(size)
        ties.append(Tie(reader.axis(x, dim), reader.axis(node, dim), every, start + every))
        start += size
    return Step(ties, Flow.COPY, reason=f"{title(reader, node)} has other sizes in it")


def _split(reader: Reader, node: Node) -> Step | None:
    """The pieces are read one by one, by calls that follow; where their sizes are unknown all stops here."""
    followed = all(_is_piece(user) and _piece(reader, user, node) is not None for user in node.users)
    return Step(silent=True) if followed else None


def _is_piece(node: Node) -> bool:
    return (
        getattr(node.target, "__name__", "") == "getitem"
        and len(node.args) == 2
        and isinstance(node.args[1], int)
    )


def _getitem(reader: Reader, node: Node) -> Step | None:
    source, index = node.args
    if not isinstance(source, Node):
        return None
    if reader.operation(source) in ("split", "chunk"):
        return _piece(reader, node, source)
    if reader.shape(source) is None:
        # An entry of sizes is nothing to stop; a tensor from an op that returns several is unknown.
        return Step(silent=True) if reader.shape(node) is None else None
    return _indexed(reader, node, source, index if isinstance(index, tuple) else (index,))


def _piece(reader: Reader, node: Node, split: Node) -> Step | None:
    x, which = operand_of(split), node.args[1]
    if not isinstance(x, Node) or not isinstance(which, int) or reader.shape(node) is None:
        return None
    dim = (argument(split, 2, "dim") or 0) % reader.rank(x)
    pieces = [piece.shape[dim] for piece in split.meta["val"]]
    if reader.size(x, dim) is None or not all(isinstance(size, int) for size in pieces):
        return None
    at = np.arange(pieces[which]) + sum(pieces[: which % len(pieces)])
    ties = [tie for k in range(reader.rank(x)) if k != dim for tie in reader.tie(x, k, node, k)]
    ties.append(Tie(reader.axis(x, dim), reader.axis(node, dim), at, np.arange(len(at))))
    return Step(ties, Flow.COPY)


def _indexed(reader: Reader, node: Node, x: Node, index: tuple[Any, ...]) -> Step | None:
    """x[:, 0] and the like: whole dimensions go on, others stop."""
    if not all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index):
        return None
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    at, named = index.index(Ellipsis), sum(i is not None and i is not Ellipsis for i in index)
    index = (*index[:at], *[slice(None)] * (reader.rank(x) - named), *index[at + 1 :])
    ties: list[Tie] = []
    before = after = 0
    for i in index:
        if i == slice(None):
            ties += reader.tie(x, before, node, after)
        before += i is not None
        after += not isinstance(i, int)
    return Step(ties, Flow.COPY, reason=f"{title(reader, node)} takes a part of it")


def _sizes(reader: Reader, node: Node) -> Step | None:
    """Which sizes are read: a number written down in the graph would no longer be true."""
    x = argument(node, 0, "input")
    if reader.operation(node) == "getattr":
        if node.args[1] in ("T", "mT"):
            return _permute(reader, node)
        if reader.shape(node) is not None:
            return None  # a tensor: H, mH, real, imag
        if node.args[1] != "shape":
            return Step(silent=True)  # dtype, device
        dims = None
    else:
        dims = argument(node, 1, "dim")
    if dims is None:
        whole = not all(_is_piece(user) for user in node.users)
        dims = range(reader.rank(x)) if whole else [user.args[1] for user in node.users]
    dims = [dims] if isinstance(dims, int) else dims
    return Step(stops={reader.axis(x, dim): f"{node.name} reads its size" for dim in dims}, silent=True)  # type: ignore[arg-type]


def _mixing(mixed: Callable[[Reader, Node], Sequence[int]]) -> Callable[[Reader, Node], Step]:
    """A rule for ops that keep the shape but compute every entry from all along some dimensions."""

    def rule(reader: Reader, node: Node) -> Step:
        reason = f"{title(reader, node)} mixes its channels"
        stops = {reader.axis(node, dim): reason for dim in mixed(reader, node)}
        ties = _same(reader, argument(node, 0, "input"), node)
        module, by_group = reader.module(node), reader.operation(node) == "group_norm"
        vectors = {} if module is None else dict(module.named_parameters())
        for name in [name for name, vector in vectors.items() if vector.dim() == 1]:
            ties += reader.tie_tensor(f"{node.target}.{name}", node, 1 if by_group else -1)
        if module is None and not by_group:
            for vector in node.all_input_nodes[1:]:
                ties += reader.tie(vector, -1, node, -1)
        return Step(ties, stops=stops, reason=reason)

    return rule


def _normalized(reader: Reader, node: Node) -> Sequence[int]:
    shape = reader.setting(node, 1, "normalized_shape")
    return range(-len(shape), 0) if isinstance(shape, tuple | list) else range(reader.rank(node))


def _dropout(reader: Reader, node: Node) -> Step:
    """One that is on: with fewer channels it would draw other numbers for the rest."""
    reason = f"{title(reader, node)} draws random numbers"
    stops = {reader.axis(node, dim): reason for dim in range(reader.rank(node))}
    return Step(_same(reader, argument(node, 0, "input"), node), stops=stops)


def _softmax_dim(reader: Reader, node: Node) -> Sequence[int]:
    dim = reader.setting(node, 1, "dim")
    return [dim] if isinstance(dim, int) else range(reader.rank(node))


def _nothing(reader: Reader, node: Node) -> Step:
    return Step(silent=True)


Rule = Callable[[Reader, Node], "Step | None"]
RULES: dict[str, Rule] = {
    **dict.fromkeys((name for name in SITE_OPS.values() if "transpose" not in name), _product),
    **{
        f"{kind}_pool{n}d": _pool
        for n in (1, 2, 3)
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
    },
    "mean": _mean,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"), _reshape),
    **dict.fromkeys(("permute", "transpose", "t", "movedim"), _permute),
    "cat": _cat,
    **dict.fromkeys(("split", "chunk"), _split),
    "getitem": _getitem,
    **dict.fromkeys(("size", "getattr"), _sizes),
    **dict.fromkeys(("dim", "ndimension", "assert"), _nothing),
    **dict.fromkeys(("layer_norm", "rms_norm"), _mixing(_normalized)),
    "group_norm": _mixing(lambda reader, node: range(1, reader.rank(node))),
    **dict.fromkeys(("softmax", "log_softmax"), _mixing(_softmax_dim)),
    **dict.fromkeys((f"{kind}dropout" for kind in ("", "feature_", "alpha_", "feature_alpha_")), _dropout),
    **dict.fromkeys((f"dropout{n}d" for n in (1, 2, 3)), _dropout),
}
"""{name of an op: what it does to channels}; ops that are not here and not pointwise stop everything."""
_WITHOUT_OUTPUT = (_split, _getitem, _sizes, _nothing)
