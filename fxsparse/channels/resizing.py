"""What every op does to the sizes of its axes: the rules for a change of widths, beside those for a removal.

Wherever the two differ, a removal has to keep the function, while new widths start anew: an op may mix channels, sum
over them or read their number, as long as every size that the graph spells out can be written anew.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import nn
from torch.fx import Node
from torch.nn.modules.dropout import _DropoutNd

from fxsparse.batch_norm import read_batch_norm
from fxsparse.channels.dependency import Axis, Contraction, Tie
from fxsparse.channels.einsums import einsum_step
from fxsparse.channels.reading import Reader, is_pointwise
from fxsparse.channels.rules import RULES, Step, _is_piece, _piece, _pointwise, _same, title
from fxsparse.channels.shapes import coordinates, matched
from fxsparse.graph import argument, factors, operand_of

UNKNOWN = "is not known to let sizes through"
"""Ends the reason of an op without a rule."""

_MODULES: dict[type[nn.Module], str] = {
    nn.Embedding: "embedding",
    nn.GLU: "glu",
    nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_unshuffle",
    nn.Upsample: "upsample",
    nn.ZeroPad2d: "pad_borders",
}


def resizing_step(reader: Reader, node: Node, heads: str = "fixed") -> Step:
    """What a node does to sizes; `heads` says which part of an axis that is cut up may change ("fixed" or "grow").

    With "fixed" it is the innermost part (the width of a head), with "grow" the one before (the number of heads).
    """
    unknown = Step(reason=f"{title(reader, node)} {UNKNOWN}")
    if node.op in ("placeholder", "output"):
        return Step(reason=f"it is an {'input' if node.op == 'placeholder' else 'output'} of the model")
    if node.op == "get_attr":
        return Step(silent=True)
    if any("val" not in x.meta for x in node.all_input_nodes):
        return Step(reason=f"what {title(reader, node)} reads has no known shape")
    if read_batch_norm(reader.gm, node) is not None:
        return _batch_norm(reader, node) or unknown
    name = _operation(reader, node)
    if name in ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"):
        return _reshape(reader, node, heads) or unknown
    rule = _RESIZING.get(name or "", RULES.get(name or ""))
    if rule is None and name is not None and is_pointwise(name):
        rule = _pointwise
    return unknown if rule is None else rule(reader, node) or unknown


def _operation(reader: Reader, node: Node) -> str | None:
    module = reader.module(node)
    if isinstance(module, _DropoutNd):
        return "dropout"
    if isinstance(module, nn.LayerNorm):
        return "layer_norm"
    if type(module) in _MODULES:
        return _MODULES[type(module)]  # type: ignore[index]
    return reader.operation(node)


def _batch_norm(reader: Reader, node: Node) -> Step | None:
    norm = read_batch_norm(reader.gm, node)
    assert norm is not None
    if norm.refusal is not None and not norm.is_module:
        return None
    ties = _same(reader, argument(node, 0, "input"), node)
    for name in norm.names.values():
        ties += reader.tie_tensor(name, node, 1)
    return Step(ties)


def _reshape(reader: Reader, node: Node, heads: str) -> Step | None:
    x = argument(node, 0, "input")
    before, after = reader.shape(x), reader.shape(node)
    runs = None if before is None or after is None else matched(before, after)
    if runs is None or before is None or after is None:
        return None
    ties: list[Tie] = []
    for inside, outside in runs:
        if len(inside) == len(outside) == 1:
            ties += reader.tie(x, inside[0], node, outside[0])
        elif len(outside) == 1 and _are_numbers(before[dim] for dim in inside):
            carriers = [k for k, dim in enumerate(inside) if reader.axis(x, dim) in reader.carried]
            if len(carriers) == 1:
                at = coordinates([before[dim] for dim in inside], carriers[0])
                a, b = reader.axis(x, inside[carriers[0]]), reader.axis(node, outside[0])
                ties.append(Tie(a, b, at, np.arange(len(at))))
        elif len(inside) == 1 and _are_numbers(after[dim] for dim in outside):
            part = len(outside) - (1 if heads == "fixed" else 2)
            at = coordinates([after[dim] for dim in outside], part)
            a, b = reader.axis(x, inside[0]), reader.axis(node, outside[part])
            ties.append(Tie(a, b, np.arange(len(at)), at))
    return Step(ties, reason=f"{title(reader, node)} cuts it up or merges it")


def _are_numbers(sizes: Iterable[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _kept(reader: Reader, node: Node) -> Step | None:
    """Dimensions that keep their size are the same, counted from the last; others are not channels."""
    x = argument(node, 0, "input")
    if not isinstance(x, Node) or reader.shape(x) is None:
        return None
    return Step(_same(reader, x, node), reason=f"{title(reader, node)} changes its size")


def _norm(reader: Reader, node: Node) -> Step:
    """LayerNorm, RMSNorm and GroupNorm; the groups of a GroupNorm stay as many."""
    x = argument(node, 0, "input")
    ties, module = _same(reader, x, node), reader.module(node)
    first = "LayerNorm2d" in type(module).__name__ or _operation(reader, node) == "group_norm"
    at = 1 if first else -1
    names = (
        [] if module is None else [f"{node.target}.{n}" for n, v in module.named_parameters() if v.dim() == 1]
    )
    for name in names:
        ties += reader.tie_tensor(name, node, at)
    for vector in node.all_input_nodes if module is None else ():
        if vector is not x and reader.rank(vector) == 1:
            ties += reader.tie(vector, 0, node, at)
    if _operation(reader, node) == "group_norm":
        groups, size = reader.setting(node, 1, "num_groups"), reader.size(node, 1)
        if isinstance(groups, int) and size is not None:
            every = np.arange(size)
            ties.append(Tie(reader.axis(node, 1), reader.axis(node, 1), every, every % (size // groups)))
    return Step(ties, reason=f"{title(reader, node)} broadcasts it")


def _reduction(reader: Reader, node: Node) -> Step | None:
    """Sums, means and the like: what they run over may have any size."""
    x, dims = argument(node, 0, "input"), argument(node, 1, "dim")
    if not isinstance(x, Node) or reader.shape(node) is None:
        return None
    rank = reader.rank(x)
    gone = (
        set(range(rank))
        if dims is None
        else {d % rank for d in (dims if isinstance(dims, tuple | list) else (dims,))}
    )
    left = [dim for dim in range(rank) if dim not in gone]
    after = left if reader.rank(node) == rank else range(len(left))
    ties = [tie for a, b in zip(left, after, strict=True) for tie in reader.tie(x, a, node, b)]
    if _operation(reader, node) == "argmax":
        return Step(ties, reason=f"{title(reader, node)} counts its positions")
    return Step(ties, free=[reader.axis(x, dim) for dim in gone], reason="it is summed over")


def _matmul(reader: Reader, node: Node) -> Step | None:
    """Products of two activations: the inner sizes are one."""
    a, b = factors(node, 0)
    if not isinstance(a, Node) or not isinstance(b, Node) or min(reader.rank(a), reader.rank(b)) < 2:
        return None
    ties = [*reader.tie(a, -1, b, -2), *reader.tie(a, -2, node, -2), *reader.tie(b, -1, node, -1)]
    for operand in (a, b):
        ties += [
            tie for dim in range(-reader.rank(operand), -2) for tie in reader.tie(operand, dim, node, dim)
        ]
    return Step(ties, reason=f"{title(reader, node)} broadcasts it")


def _glu(reader: Reader, node: Node) -> Step:
    """A channel of the result is one of either half."""
    x = argument(node, 0, "input")
    dim = reader.setting(node, 1, "dim", -1) % reader.rank(x)
    ties = [tie for k in range(reader.rank(x)) if k != dim for tie in reader.tie(x, k, node, k)]
    size = reader.size(x, dim)
    if size is not None:
        every = np.arange(size)
        ties.append(Tie(reader.axis(x, dim), reader.axis(node, dim), every, every % (size // 2)))
    return Step(ties)


def _attention(reader: Reader, node: Node) -> Step | None:
    q, k, v = (argument(node, place, name) for place, name in enumerate(("query", "key", "value")))
    ties = [*reader.tie(q, -1, k, -1), *reader.tie(v, -1, node, -1), *reader.tie(q, -2, node, -2)]
    ties += reader.tie(k, -2, v, -2)
    for operand in (q, k, v):
        ties += [
            tie for dim in range(-reader.rank(operand), -2) for tie in reader.tie(operand, dim, node, dim)
        ]
    return Step(ties, reason=f"{title(reader, node)} broadcasts it")


def _embedding(reader: Reader, node: Node) -> Step | None:
    module = reader.module(node)
    if module is not None:
        weight = Axis(reader.name(f"{node.target}.weight"), 1)
    else:
        tables = [x for x in node.all_input_nodes if x.op == "get_attr" and reader.rank(x) == 2]
        tables = [x for x in tables if x.meta["val"].is_floating_point()]
        if len(tables) != 1:
            return None
        weight = reader.axis(tables[0], 1)
    size, out = reader.size(node, -1), reader.axis(node, -1)
    if size is None:
        return None
    return Step([Tie.whole(weight, out, size)], produces=out, reason="it is the number of embeddings")


def _transposed_convolution(reader: Reader, node: Node) -> Step | None:
    x, weight, bias = (argument(node, k, name) for k, name in enumerate(("input", "weight", "bias")))
    at, groups = 1 - reader.rank(weight), argument(node, 6, "groups") or 1
    if groups != 1 or reader.size(x, at) is None:
        return None
    ties = reader.tie(weight, 1, node, at)
    ties += reader.tie(bias, 0, node, at) if isinstance(bias, Node) else []
    contraction = Contraction(node, reader.axis(x, at), reader.axis(weight, 0))
    return Step(ties, contraction=contraction, produces=reader.axis(node, at), reason="it slides over it")


def _cat(reader: Reader, node: Node) -> Step:
    operands, ties, start = argument(node, 0, "tensors"), [], 0
    dim = (argument(node, 1, "dim") or 0) % max(1, reader.rank(node))
    along = _are_numbers(reader.size(x, dim) for x in operands)
    for x in operands:
        ties += [tie for k in range(reader.rank(x)) if k != dim for tie in reader.tie(x, k, node, k)]
        if along:
            every = np.arange(reader.size(x, dim) or 0)
            ties.append(Tie(reader.axis(x, dim), reader.axis(node, dim), every, start + every))
            start += len(every)
    return Step(ties, reason=f"{title(reader, node)} has other sizes in it")


def _split(reader: Reader, node: Node) -> Step | None:
    """Pieces of one size stay so."""
    x, size = operand_of(node), argument(node, 1, "split_size")
    if not all(_is_piece(user) for user in node.users) or not isinstance(x, Node):
        return None
    if any(_piece(reader, user, node) is None for user in node.users):
        return None
    dim = argument(node, 2, "dim") or 0
    pieces = [piece.shape[dim] for piece in node.meta["val"]]
    ties: list[Tie] = []
    equal = not isinstance(size, tuple | list) and _are_numbers(pieces) and len(set(pieces)) == 1
    if reader.operation(node) == "tensor_split" and not equal:
        return None
    if equal:
        axis, every = reader.axis(x, dim), np.arange(pieces[0])
        ties = [Tie(axis, axis, every, every + k * pieces[0]) for k in range(1, len(pieces))]
    return Step(ties, silent=True)


def _unbind(reader: Reader, node: Node) -> Step | None:
    """There stay as many as its readers take."""
    x = operand_of(node)
    if not all(_is_piece(user) for user in node.users) or not isinstance(x, Node):
        return None
    axis = reader.axis(x, (argument(node, 1, "dim") or 0) % reader.rank(x))
    return Step(stops={axis: f"{title(reader, node)} takes it apart"}, silent=True)


def _slice(reader: Reader, node: Node) -> Step:
    """A part of an axis is a part of its channels; a stride through them is not followed."""
    x = argument(node, 0, "input")
    dim = (argument(node, 1, "dim") or 0) % reader.rank(x)
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step") or 1
    ties = [tie for k in range(reader.rank(x)) if k != dim for tie in reader.tie(x, k, node, k)]
    size, taken = reader.size(x, dim), reader.size(node, dim)
    if size is not None and taken is not None and isinstance(start, int) and step == 1:
        first = max(0, start + size) if start < 0 else start
        every = np.arange(taken)
        ties.append(Tie(reader.axis(x, dim), reader.axis(node, dim), first + every, every))
    return Step(ties, reason=f"{title(reader, node)} takes a part of it")


def _select(reader: Reader, node: Node) -> Step:
    x = argument(node, 0, "input")
    dim = (argument(node, 1, "dim") or 0) % reader.rank(x)
    return _without(reader, x, dim, node)


def _without(reader: Reader, x: Node, dim: int, node: Node) -> Step:
    left = [k for k in range(reader.rank(x)) if k != dim]
    ties = [tie for after, k in enumerate(left) for tie in reader.tie(x, k, node, after)]
    return Step(ties, reason=f"{title(reader, node)} takes one of it")


def _getitem(reader: Reader, node: Node) -> Step | None:
    source = node.args[0]
    if isinstance(source, Node) and reader.operation(source) in ("split", "chunk", "tensor_split"):
        return _piece(reader, node, source)
    if isinstance(source, Node) and reader.operation(source) == "unbind":
        x = operand_of(source)
        return _without(reader, x, (argument(source, 1, "dim") or 0) % reader.rank(x), node)
    return RULES["getitem"](reader, node)


def _pad(reader: Reader, node: Node) -> Step | None:
    x, pads = argument(node, 0, "input"), argument(node, 1, "pad")
    if not isinstance(x, Node) or not _are_numbers(pads):
        return None
    ties: list[Tie] = []
    for dim in range(-reader.rank(x), 0):
        before = pads[-2 * dim - 2] if -2 * dim - 2 < len(pads) else 0
        size = reader.size(x, dim)
        if size is not None and before >= 0 and before + size <= (reader.size(node, dim) or 0):
            every = np.arange(size)
            ties.append(Tie(reader.axis(x, dim), reader.axis(node, dim), every, before + every))
    return Step(ties, reason=f"{title(reader, node)} adds to it")


def _pixel_shuffle(reader: Reader, node: Node) -> Step:
    """[.., C r r, H, W] and [.., C, H r, W r]: a channel of few is r r channels of many."""
    x = argument(node, 0, "input")
    many, few = (x, node) if _operation(reader, node) == "pixel_shuffle" else (node, x)
    every = np.arange(reader.size(many, -3) or 0)
    at = every // max(1, len(every) // (reader.size(few, -3) or 1))
    a, b = (every, at) if many is x else (at, every)
    ties = [Tie(reader.axis(x, -3), reader.axis(node, -3), a, b)]
    return Step(ties, reason=f"{title(reader, node)} moves pixels")


def _sizes(reader: Reader, node: Node) -> Step | None:
    """A size that the graph reads as it runs is the new one."""
    if reader.operation(node) == "getattr" and reader.shape(node) is not None:
        return RULES["t"](reader, node) if node.args[1] in ("T", "mT") else None
    return Step(silent=True)


def _nothing(reader: Reader, node: Node) -> Step:
    return Step(silent=True)


_RESIZING: dict[str, Callable[[Reader, Node], Step | None]] = {
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _norm),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "prod", "argmax"), _reduction),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "einsum": einsum_step,
    "glu": _glu,
    "scaled_dot_product_attention": _attention,
    "embedding": _embedding,
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), _transposed_convolution),
    "cat": _cat,
    **dict.fromkeys(("split", "chunk", "tensor_split"), _split),
    "unbind": _unbind,
    "slice": _slice,
    "select": _select,
    "getitem": _getitem,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _pixel_shuffle),
    **dict.fromkeys(("size", "getattr"), _sizes),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "sym_size"), _nothing),
    **dict.fromkeys(
        (
            *(
                "softmax",
                "log_softmax",
                "dropout",
                "feature_dropout",
                "alpha_dropout",
                "dropout1d",
                "dropout2d",
            ),
            *(
                "dropout3d",
                "to",
                "type_as",
                "clone",
                "contiguous",
                "float",
                "half",
                "detach",
                "alias",
                "lift_fresh",
            ),
            *(
                "roll",
                "flip",
                "expand",
                "expand_as",
                "repeat",
                "cumsum",
                "normalize",
                "interpolate",
                "upsample",
            ),
            *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "pad_borders", "identity"),
        ),
        _kept,
    ),
}
"""{name of an op: what it does to sizes}; the others are as for a removal, pointwise, or let no size through."""
