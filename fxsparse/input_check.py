"""What the inputs of a captured graph have to be: a graph forgets the branches that its example inputs did not take."""

import inspect
import itertools
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import sympy
import torch
from torch import SymInt, Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse.errors import TraceError
from fxsparse.exported_program import is_exported
from fxsparse.inputs import split_inputs

_FUNCTIONS = {"FloorDiv": operator.floordiv, "remainder": operator.mod}
"""PyTorch's integer functions of sizes, by the names that sympy prints."""
_REMAINDERS = ("Mod", "PythonMod")
"""Functions that sympy would print as ``a % b``, without brackets around a product `b`."""
_MISSING = inspect.Parameter.empty
"""In the place of an argument that a call does not give."""


@dataclass(frozen=True)
class InputCheck:
    """Raises TraceError for a call that the graph would answer with something else than the model.

    It asks for the containers and tensors of the example inputs; for the sizes and values that ``torch.export`` took
    for granted, and its order of arguments; and for one tensor at the places where the example had one, if that makes a
    difference.  Other arguments than the example's are left to the graph.
    """

    names: tuple[str, ...]
    """Of the arguments, in the example's order."""
    structures: tuple[pytree.TreeSpec | None, ...]
    """Of each argument: its containers, None for a plain value."""
    wanted: tuple[Any, ...] | None = None
    """Of each leaf: a tuple of sizes for a tensor, a number or a symbol each; of others the value.  None: any."""
    condition: Any = sympy.true
    """Of the symbols."""
    same: tuple[int, ...] | None = None
    """For each leaf the first one that is the same tensor; None where that makes no difference."""
    tensors: tuple[int, ...] = ()
    """The leaves that have to be tensors, of any sizes."""
    positional: tuple[str, ...] | None = None
    """Names of the arguments that may be given by position, in the model's order; None: all, in the example's order."""
    dtypes: tuple[torch.dtype | None, ...] = ()
    """Of the tensors among the leaves of an export; a float stands for all of them, which modules are moved between."""
    in_order: int = field(init=False, repr=False, compare=False)
    """How many of them have the place that they have in an export, where arguments are in the example's order."""
    shapes: tuple[Any, ...] = field(init=False, repr=False, compare=False)
    """`wanted` with the names of symbols: what Dynamo of torch 2.11 can look up."""
    symbols: list[str] = field(init=False, repr=False, compare=False)
    """The names of those that the condition has, in order."""
    holds: Any = field(init=False, repr=False, compare=False)
    """The condition as a function of them."""

    def __post_init__(self) -> None:
        if self.positional is None:
            object.__setattr__(self, "positional", self.names)
        pairs = zip(self.names, self.positional or (), strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        object.__setattr__(self, "in_order", len(list(same)))
        symbols = sorted(self.condition.free_symbols, key=str)
        object.__setattr__(self, "symbols", list(map(str, symbols)))
        object.__setattr__(self, "shapes", tuple(map(_named, self.wanted or ())))
        spelled = self.condition.replace(
            lambda part: part.func.__name__ in _REMAINDERS,
            lambda part: sympy.Function("remainder")(*part.args),
        )
        object.__setattr__(self, "holds", sympy.lambdify(symbols, spelled, [_FUNCTIONS, "math"]))

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.names, self.structures, self.wanted, self.condition, self.same, self.tensors)
        return type(self), (*fields, self.positional, self.dtypes)

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if self.wanted is not None and len(args) > self.in_order:
            self._refuse_order(len(args))
        given = {**dict(zip(self.positional or (), args, strict=False)), **kwargs}
        leaves: list[Any] = []
        for name, structure in zip(self.names, self.structures, strict=True):
            value = given.get(name, _MISSING)
            leaves += [value] if structure is None else _leaves(name, value, structure)
        for k in self.tensors:
            if not isinstance(leaves[k], Tensor):
                raise _refused(f"expected a tensor as {self._place(k)}, as in the example", _said(leaves[k]))
        if self.wanted is not None:
            self._check_sizes(leaves)
        for k, dtype in enumerate(self.dtypes):
            if dtype is not None and leaves[k].dtype != dtype and not _are_floats(leaves[k].dtype, dtype):
                got = f"one of {leaves[k].dtype}"
                raise _refused(f"expected a tensor of {dtype} as {self._place(k)}, as in the example", got)
        if self.same is not None:
            self._check_same(leaves)

    def _refuse_order(self, count: int) -> NoReturn:
        named = ", ".join(map(repr, self.names[self.in_order :]))
        expected = f"{named} by name" if named else f"at most {self.in_order} by position"
        raise _refused(f"expected {expected}, as in the example", f"{count} arguments by position")

    def _check_sizes(self, leaves: Sequence[Any]) -> None:
        sizes: dict[str, int] = {}
        for k, (leaf, wanted) in enumerate(zip(leaves, self.shapes, strict=True)):
            if not isinstance(wanted, tuple):
                if leaf is not wanted and (isinstance(leaf, Tensor) or leaf != wanted):
                    raise _refused(f"expected {wanted!r} as {self._place(k)}, as in the example", _said(leaf))
            elif not isinstance(leaf, Tensor) or not _fits(leaf.shape, wanted, sizes):
                raise _refused(f"expected a tensor [{_sizes(wanted)}] as {self._place(k)}", _said(leaf))
        if not self.holds(*(sizes[symbol] for symbol in self.symbols)):
            shapes = [
                f"{self._place(k)} [{_sizes(w)}]" for k, w in enumerate(self.shapes) if isinstance(w, tuple)
            ]
            got = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items())
            raise _refused(f"expected {self.condition} for {', '.join(shapes)}", got)

    def _check_same(self, leaves: Sequence[Any]) -> None:
        assert self.same is not None
        for k, (leaf, first) in enumerate(zip(leaves, self.same, strict=True)):
            found = next(j for j, other in enumerate(leaves) if other is leaf)
            if isinstance(leaf, Tensor) and found != first:
                places = f"{self._place(min(first, found))} and {self._place(k)}"
                one, two = "one tensor", "two tensors"
                expected, got = (one, two) if first != k else (two, one)
                raise _refused(f"expected {expected} as {places}, as in the example", got)

    def _place(self, leaf: int) -> str:
        """The argument that a leaf is in."""
        for name, structure in zip(self.names, self.structures, strict=True):
            leaf -= 1 if structure is None else structure.num_leaves
            if leaf < 0:
                return repr(name)
        raise IndexError(leaf)


def _leaves(name: str, value: Any, wanted: pytree.TreeSpec) -> list[Any]:
    leaves, structure = pytree.tree_flatten(value)
    if structure != wanted:
        got = _said(value) if structure.is_leaf() else f"{structure}"
        raise _refused(f"expected {wanted} as {name!r}, as in the example", got)
    return leaves


def _named(wanted: Any) -> Any:
    if not isinstance(wanted, tuple):
        return wanted
    return tuple(size if isinstance(size, int) else str(size) for size in wanted)


def _fits(shape: Sequence[int], wanted: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape is the one that was wanted; finds out what its symbols are."""
    if len(shape) != len(wanted):
        return False
    return all(
        found == (size if isinstance(size, int) else sizes.setdefault(size, found))
        for found, size in zip(shape, wanted, strict=True)
    )


def _are_floats(one: torch.dtype, other: torch.dtype) -> bool:
    return one.is_floating_point and other.is_floating_point


def _sizes(wanted: tuple[int | str, ...]) -> str:
    return ", ".join(map(str, wanted))


def _said(leaf: Any) -> str:
    if leaf is _MISSING:
        return "no such argument"
    return f"a tensor {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def _refused(expected: str, got: str) -> TraceError:
    return TraceError(
        f"{expected}, got {got}: the model was captured for its example inputs, and its code may do something else "
        "for others; compile it with example inputs of this kind"
    )


def refuse_another_value(error: AssertionError) -> None:
    """Raise TraceError in place of what a graph says of an argument whose value it was traced with."""
    found = re.match(r"(\w+) has been specialized to have value (.*) but got another value", str(error))
    if found is not None:
        raise _refused(
            f"expected {found[1]}={found[2]}, as in the example inputs", "another value"
        ) from error


# -- what a check asks for ---------------------------------------------------------------------------------


def input_check(
    model: nn.Module, example_inputs: Any, gm: GraphModule, exported: bool, distinct: bool
) -> InputCheck | None:
    """The check of a graph; None where there is nothing to ask for.

    `exported`: the graph has the sizes of ``torch.export``; `distinct`: it makes a difference which inputs are one
    tensor.
    """
    args, kwargs = split_inputs(example_inputs)
    flat = [pytree.tree_flatten(value) for value in (*args, *kwargs.values())]
    structures = tuple(None if spec.is_leaf() else spec for _, spec in flat)
    leaves = [leaf for found, _ in flat for leaf in found]
    same = tuple(next(j for j, other in enumerate(leaves) if other is leaf) for leaf in leaves)
    wanted, condition = _taken_for_granted(gm, is_exported(model)) if exported else (None, sympy.true)
    parameters = [*inspect.signature(type(model).forward).parameters.values()][1:]
    positional = _positional(parameters, len(args))
    names = (*positional[: len(args)], *kwargs)
    if wanted is None and not distinct and not any(structures) and _is_one_tensor(parameters, names):
        return None
    tensors = tuple(k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    dtypes = tuple(leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves)
    return InputCheck(
        names,
        structures,
        wanted,
        condition,
        same if distinct else None,
        () if exported else tensors,
        positional,
        dtypes if exported else (),
    )


def _is_one_tensor(parameters: Sequence[inspect.Parameter], names: tuple[str, ...]) -> bool:
    """Whether the arguments are just one, which every call has to give: a call without it fails in any graph."""
    return len(names) == 1 and all(p.default is p.empty for p in parameters if p.name == names[0])


def _positional(parameters: Sequence[inspect.Parameter], count: int) -> tuple[str, ...]:
    """Names of at least `count` arguments by position; no keyword could give those that a `*args` takes."""
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (*named, *(f"*{k}" for k in range(len(named), count)))


def _taken_for_granted(gm: GraphModule, bounded: bool) -> tuple[tuple[Any, ...], Any]:
    """Of the inputs: sizes and values, and what holds for the sizes that have symbols.

    `bounded`: bounds of symbols are no guards, as in a program that the user exported.
    Conditions that join sizes are left out: PyTorch's own views and broadcasts add many, which no branch depends on.
    """
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    wanted = tuple(tuple(map(_size, v.shape)) if isinstance(v, Tensor) else v for v in values)
    free: list[Any] = [
        s.node for v in values if isinstance(v, Tensor) for s in tuple(v.shape) if isinstance(s, SymInt)
    ]
    symbols = {node.expr for node in free}
    guards = [guard.expr for guard in free[0].shape_env.guards] if free else []
    guards += [bound for node in free for bound in _bounds(node)] if bounded else []
    return wanted, sympy.And(*(g for g in guards if len(g.free_symbols) == 1 and g.free_symbols <= symbols))


def _bounds(size: Any) -> list[Any]:
    """How large a symbolic size may be, as inequalities; PyTorch takes 2 or more to stand for any."""
    found = size.shape_env.var_to_range.get(size.expr)
    if found is None:
        return []
    lower = [size.expr >= found.lower] if found.lower > 2 else []
    return [*lower, *([size.expr <= found.upper] if found.upper < sys.maxsize - 1 else [])]


def _size(size: int | SymInt) -> Any:
    if isinstance(size, int):
        return size
    return size.node.expr if size.node.expr.free_symbols else int(size.node.expr)  # type: ignore[arg-type]


def has_twins(example_inputs: Any) -> bool:
    """Whether inputs are one tensor."""
    found = [id(leaf) for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    return len(set(found)) < len(found)


def regrouped(example_inputs: Any) -> Any:
    """Inputs of which others are one tensor than in the example: all its tensors apart, or, where they are, those that
    are alike the same.  None where there are no two that are alike.
    """
    leaves, spec = pytree.tree_flatten(split_inputs(example_inputs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    kinds = {(leaf.shape, leaf.dtype): leaf for leaf in reversed(tensors)}
    if len(kinds) == len(tensors):
        return None
    seen: set[int] = set()
    if has_twins(example_inputs):
        made = [_other(leaf) if id(leaf) in seen or seen.add(id(leaf)) else leaf for leaf in leaves]
    else:
        made = [kinds[leaf.shape, leaf.dtype] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(made, spec)
    return (*args, kwargs)


def as_captured(example_inputs: Any, accepts: Mapping[str, InputCheck]) -> Any:
    """Example inputs with which tracing again gives the graphs that `accepts` is of: with tensors that are one apart,
    where the model does not ask.
    """
    asks = any(check.same is not None for check in accepts.values())
    return example_inputs if asks or not has_twins(example_inputs) else regrouped(example_inputs)


def _other(leaf: Any) -> Any:
    """A tensor of the same kind with the same values in another order; anything else as it is."""
    return leaf.flatten().roll(1).view(leaf.shape) if isinstance(leaf, Tensor) else leaf
