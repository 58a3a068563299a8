"""The sizes that the calls of a graph spell out, written anew for new widths."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import isclose
from typing import Any

import numpy as np
from torch.fx import GraphModule, Node

from fxsparse.channels.dependency import Axis
from fxsparse.channels.einsums import einsum_labels
from fxsparse.channels.reading import Reader
from fxsparse.channels.widening import Widths
from fxsparse.graph import SITE_OPS, argument, factors, operand_of


def rewrite_sizes(gm: GraphModule, widths: Widths) -> int:
    """Write every size anew that a call spells out; returns how many calls changed."""
    reader, rewrites = Reader(gm), 0
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            continue
        before = (node.args, node.kwargs)
        name = reader.operation(node) or ""
        rule = _SIZES.get("conv" if node.target in SITE_OPS else name)
        if rule is not None:
            rule(reader, node, widths)
        rewrites += before != (node.args, node.kwargs)
    return rewrites


def _set(node: Node, position: int, name: str, value: Any) -> None:
    """Give an argument, where it stands already, another value."""
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _of_output(reader: Reader, node: Node, widths: Widths, given: Any, first: int = 0) -> list[Any]:
    """Sizes as a call asks for them, from dimension `first` of its output on; -1 and computed ones stay.

    A size that is computed from one that grows is written as a number, since it may be that of something that does not.
    """
    return [
        widths.new(reader.axis(node, first + k), size) if _is_written(reader, widths, size) else size
        for k, size in enumerate(given)
    ]


def _is_written(reader: Reader, widths: Widths, size: Any) -> bool:
    """Whether a size stands for the width of an axis: as a number, or computed from a width that grows."""
    if not isinstance(size, Node):
        return isinstance(size, int) and size >= 0
    return isinstance(size.meta.get("val"), int) and any(
        widths.grows(axis) for axis in _sizes_read(reader, size)
    )


def _sizes_read(reader: Reader, number: Node) -> Iterator[Axis]:
    """The axes whose sizes a number is computed from."""
    name, x = reader.operation(number), number.args[0] if number.args else None
    if not isinstance(x, Node):
        return
    if name in ("size", "getattr") and reader.shape(x) is not None:
        dim = argument(number, 1, "dim") if name == "size" else None
        yield from (reader.axis(x, k) for k in ([dim] if isinstance(dim, int) else range(reader.rank(x))))
    elif name == "getitem" and reader.operation(x) in ("size", "getattr") and isinstance(number.args[1], int):
        yield reader.axis(argument(x, 0, "input"), number.args[1])
    elif reader.shape(number) is None:
        for part in number.all_input_nodes:
            yield from _sizes_read(reader, part)


def _view(reader: Reader, node: Node, widths: Widths) -> None:
    given = node.args[1:] or ()
    if len(given) == 1 and isinstance(given[0], tuple | list):
        node.update_arg(1, _of_output(reader, node, widths, given[0]))
    elif given:
        node.args = (node.args[0], *_of_output(reader, node, widths, given))
    for name in ("shape", "size"):
        if isinstance(node.kwargs.get(name), tuple | list):
            node.update_kwarg(name, _of_output(reader, node, widths, node.kwargs[name]))


def _unflatten(reader: Reader, node: Node, widths: Widths) -> None:
    dim, sizes = argument(node, 1, "dim"), argument(node, 2, "sizes")
    first = dim % reader.rank(argument(node, 0, "input"))
    _set(node, 2, "sizes", _of_output(reader, node, widths, sizes, first))


def _normalized_shape(reader: Reader, node: Node, widths: Widths) -> None:
    given = argument(node, 1, "normalized_shape")
    _set(node, 1, "normalized_shape", _of_output(reader, node, widths, given, reader.rank(node) - len(given)))


def _groups(reader: Reader, node: Node, widths: Widths) -> None:
    groups = argument(node, 6, "groups") or 1
    at = 1 - reader.rank(argument(node, 1, "weight"))
    if groups != 1 and node.kwargs.get("groups", groups) == groups:
        axis = reader.axis(node, at)
        _set(node, 6, "groups", groups * widths.size(axis) // len(widths.labels[axis]))


def _pieces(reader: Reader, node: Node, widths: Widths) -> None:
    """Pieces of which the call says how large they are; a chunk says how many there are, which stays."""
    x, dim = operand_of(node), argument(node, 2, "dim") or 0
    name = next((n for n in ("split_size_or_sections", "split_sizes") if n in node.kwargs), "split_size")
    given, axis = argument(node, 1, name), reader.axis(x, dim)
    if not widths.grows(axis):
        return
    several = isinstance(given, tuple | list)
    sizes = [n.meta.get("val") if isinstance(n, Node) else n for n in (given if several else [given])]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) != len(sizes):
        return
    ends = np.cumsum([0, *known])
    new = [widths.before(axis, int(b)) - widths.before(axis, int(a)) for a, b in pairwise(ends)]
    _set(node, 1, name, new if several else new[0])


def _part(reader: Reader, node: Node, widths: Widths) -> None:
    x = argument(node, 0, "input")
    dim = (argument(node, 1, "dim") or 0) % reader.rank(x)
    axis, size = reader.axis(x, dim), reader.size(x, dim)
    if size is None or not widths.grows(axis):
        return
    for position, name in ((2, "start"), (3, "end")):
        at = argument(node, position, name)
        if isinstance(at, int):
            _set(node, position, name, widths.before(axis, max(0, at + size) if at < 0 else min(at, size)))


def _pads(reader: Reader, node: Node, widths: Widths) -> None:
    x, pads = argument(node, 0, "input"), list(argument(node, 1, "pad"))
    for k in range(0, len(pads), 2):
        dim = -1 - k // 2
        inside, outside = reader.axis(x, dim), reader.axis(node, dim)
        if outside in widths.labels and widths.grows(outside) and inside in widths.labels:
            pads[k] = widths.before(outside, pads[k])
            pads[k + 1] = widths.size(outside) - widths.size(inside) - pads[k]
    _set(node, 1, "pad", pads)


def _attention_scale(reader: Reader, node: Node, widths: Widths) -> None:
    """A scale that was one over the root of the heads' width goes with it."""
    scale, query = node.kwargs.get("scale"), argument(node, 0, "query")
    new = _root(reader, widths, query, -1, scale)
    if new is not None:
        node.update_kwarg("scale", new)


def _scale(reader: Reader, node: Node, widths: Widths) -> None:
    """``x * d ** -0.5`` or ``x / d ** 0.5``, where d is the last size of x, or what a product x was summed over."""
    x, number = (*node.args, None)[:2]
    if not isinstance(x, Node) or not isinstance(number, float) or number <= 0:
        return
    inverse = reader.operation(node) == "div"
    new = _root(reader, widths, *_summed(reader, x), 1 / number if inverse else number)
    if new is not None:
        node.update_arg(1, 1 / new if inverse else new)


def _summed(reader: Reader, x: Node) -> tuple[Any, int]:
    """(operand, dimension) that a product is summed over; the last one of anything else."""
    if reader.operation(x) in ("matmul", "bmm"):
        return factors(x, 0)[0], -1
    if reader.operation(x) == "einsum" and (found := einsum_labels(reader, x)) is not None:
        operands, read, made = found
        gone = [dim for dim, label in enumerate(read[0]) if label not in made]
        return (operands[0], gone[0]) if len(gone) == 1 else (None, -1)
    return x, -1


def _root(reader: Reader, widths: Widths, x: Any, dim: int, scale: Any) -> float | None:
    """The new scale, where the given one is one over the root of a size of x, and that grows."""
    size = reader.size(x, dim) if isinstance(x, Node) else None
    if size is None or not isinstance(scale, float) or not isclose(scale, size**-0.5, rel_tol=1e-6):
        return None
    axis = reader.axis(x, dim)
    return widths.size(axis) ** -0.5 if widths.grows(axis) else None


_SIZES: dict[str, Callable[[Reader, Node, Widths], None]] = {
    **dict.fromkeys(("view", "reshape", "expand"), _view),
    "unflatten": _unflatten,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized_shape),
    "conv": _groups,
    "split": _pieces,
    "slice": _part,
    **dict.fromkeys(("pad", "constant_pad_nd"), _pads),
    "scaled_dot_product_attention": _attention_scale,
    **dict.fromkeys(("mul", "div"), _scale),
}
"""{name of an op: how its sizes are written anew}; those of other ops are not spelled out."""
