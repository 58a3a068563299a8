"""An InputCheck as JSON values and back; what it asks of sizes is built from named relations, never evaluated."""

from collections.abc import Mapping
from typing import Any

import sympy
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from fxsparse.errors import CheckpointError
from fxsparse.input_check import InputCheck

_RELATIONS: Mapping[str, Any] = {
    cls.__name__: cls
    for cls in (
        *(sympy.And, sympy.Or, sympy.Not, sympy.Eq, sympy.Ne, sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt),
        *(sympy.Add, sympy.Mul, sympy.Pow, sympy.Min, sympy.Max, FloorDiv, Mod, PythonMod),
    )
}
_TRUTH = {"true": sympy.true, "false": sympy.false}


def to_json(check: InputCheck) -> dict[str, Any]:
    """The check as JSON values.

    Raises:
        CheckpointError: it asks for what has no name here, such as an argument of a class of the user's.
    """
    wanted = None if check.wanted is None else [_leaf(leaf) for leaf in check.wanted]
    return {
        "names": list(check.names),
        "structures": [None if spec is None else structure_text(spec) for spec in check.structures],
        "wanted": wanted,
        "condition": _expression(check.condition),
        "same": None if check.same is None else list(check.same),
    }


def from_json(row: Mapping[str, Any]) -> InputCheck:
    """What `to_json` was given; ValueError, TypeError or KeyError for anything else."""
    same, wanted = row["same"], row["wanted"]
    return InputCheck(
        tuple(row["names"]),
        tuple(None if text is None else pytree.treespec_loads(text) for text in row["structures"]),
        None if wanted is None else tuple(_from_leaf(leaf) for leaf in wanted),
        _from_expression(row["condition"]),
        None if same is None else tuple(map(int, same)),
    )


def structure_text(spec: pytree.TreeSpec) -> str:
    """Containers as text, by the names under which PyTorch knows their classes."""
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"save: expected arguments and results in tuples, lists, dicts or classes that PyTorch can name, got {spec}"
            f": {error}. Pickle the module instead."
        ) from error


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, tuple):
        return {"sizes": [size if isinstance(size, int) else _expression(size) for size in leaf]}
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return {"value": leaf}
    raise CheckpointError(
        f"save: expected plain values among the arguments, got {type(leaf).__name__}; pickle the module."
    )


def _from_leaf(row: Mapping[str, Any]) -> Any:
    if "sizes" in row:
        return tuple(size if isinstance(size, int) else _from_expression(size) for size in row["sizes"])
    return row["value"]


def _expression(expression: Any) -> Any:
    """A number, a symbol's name, or {relation: its parts}."""
    if expression in (sympy.true, sympy.false):
        return {"truth": str(bool(expression)).lower()}
    if isinstance(expression, sympy.Symbol):
        return {"symbol": expression.name, "positive": bool(expression.is_positive)}
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Rational):
        return {"share": [int(expression.p), int(expression.q)]}
    for name, cls in _RELATIONS.items():
        if expression.func is cls:
            return {"relation": name, "of": [_expression(part) for part in expression.args]}
    raise CheckpointError(
        f"save: the inputs have to meet {expression}, which no file can say; pickle the module."
    )


def _from_expression(row: Any) -> Any:
    if isinstance(row, int):
        return sympy.Integer(row)
    if "truth" in row:
        return _TRUTH[row["truth"]]
    if "symbol" in row:
        return sympy.Symbol(_identifier(row["symbol"]), integer=True, positive=row["positive"] or None)
    if "share" in row:
        return sympy.Rational(*map(int, row["share"]))
    return _RELATIONS[row["relation"]](*map(_from_expression, row["of"]))


def _identifier(name: str) -> str:
    # sympy makes code of its symbols.
    if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
        raise ValueError(f"expected the name of a size, got {name!r}")
    return name
