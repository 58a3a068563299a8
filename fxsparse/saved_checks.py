"""An InputCheck as JSON values and back; what it asks of sizes is built from named relations, never evaluated."""

from collections.abc import Mapping
from typing import Any

import sympy
import torch
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
_IMPORTING = ("defaultdict", "__enum__", "\\u")
"""In the text of containers: what makes PyTorch import a module that the text names, and what could spell it."""
_ASSUMED = ("integer", "positive", "nonnegative")
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
        "condition": expression_to_json(check.condition),
        "same": None if check.same is None else list(check.same),
        "tensors": list(check.tensors),
        "positional": list(check.positional or ()),
        "dtypes": [None if dtype is None else str(dtype).removeprefix("torch.") for dtype in check.dtypes],
    }


def from_json(row: Mapping[str, Any]) -> InputCheck:
    """What `to_json` was given; ValueError, TypeError or KeyError for anything else."""
    same, wanted = row["same"], row["wanted"]
    return InputCheck(
        tuple(row["names"]),
        tuple(None if text is None else structure_of(text) for text in row["structures"]),
        None if wanted is None else tuple(_from_leaf(leaf) for leaf in wanted),
        expression_from_json(row["condition"]),
        None if same is None else tuple(map(int, same)),
        tuple(map(int, row.get("tensors", ()))),
        None if (positional := row.get("positional")) is None else tuple(positional),
        tuple(map(_dtype, row.get("dtypes", ()))),
    )


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name)
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"torch.{name} is no dtype")
    return dtype


def of_header(header: Mapping[str, Any]) -> dict[str, InputCheck]:
    """{mode: its check} of a file."""
    return {mode: from_json(row) for mode, row in header.get("accepts", {}).items()}


def structure_text(spec: pytree.TreeSpec) -> str:
    """Containers as text, by the names under which PyTorch knows their classes."""
    try:
        text = pytree.treespec_dumps(spec)
        _refuse_imports(text)
        return text
    except (NotImplementedError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"save: expected arguments and results in tuples, lists, dicts or classes that PyTorch can name, got {spec}"
            f": {error}. Pickle the module instead."
        ) from error


def structure_of(text: str) -> pytree.TreeSpec:
    """What `structure_text` was given; ValueError, TypeError or LookupError for anything else."""
    try:
        _refuse_imports(text)
        return pytree.treespec_loads(text)
    except NotImplementedError as error:
        raise ValueError(f"{error}") from error


def _refuse_imports(text: str) -> None:
    found = [word for word in _IMPORTING if word in text]
    if found:
        raise ValueError(f"a file cannot hold {text!r}, which has {found[0]!r}")


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, tuple):
        return {"sizes": [size if isinstance(size, int) else expression_to_json(size) for size in leaf]}
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return {"value": leaf}
    raise CheckpointError(
        f"save: expected plain values among the arguments, got {type(leaf).__name__}; pickle the module."
    )


def _from_leaf(row: Mapping[str, Any]) -> Any:
    if "sizes" in row:
        return tuple(size if isinstance(size, int) else expression_from_json(size) for size in row["sizes"])
    return row["value"]


def expression_to_json(expression: Any) -> Any:
    """A sympy expression: a number, a symbol's name, or {relation: its parts}."""
    if expression in (sympy.true, sympy.false):
        return {"truth": str(bool(expression)).lower()}
    if isinstance(expression, sympy.Symbol):
        known = {key: True for key in _ASSUMED if expression.assumptions0.get(key)}
        return {"symbol": expression.name, **known}
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Rational):
        return {"share": [int(expression.p), int(expression.q)]}
    if isinstance(expression, sympy.Float):
        return {"real": float(expression)}
    for name, cls in _RELATIONS.items():
        if expression.func is cls:
            return {"relation": name, "of": [expression_to_json(part) for part in expression.args]}
    raise CheckpointError(
        f"save: the inputs have to meet {expression}, which no file can say; pickle the module."
    )


def expression_from_json(row: Any) -> Any:
    """What `expression_to_json` was given."""
    if isinstance(row, int):
        return sympy.Integer(row)
    if "truth" in row:
        return _TRUTH[row["truth"]]
    if "symbol" in row:
        return sympy.Symbol(_identifier(row["symbol"]), **{key: True for key in _ASSUMED if row.get(key)})
    if "share" in row:
        return sympy.Rational(*map(int, row["share"]))
    if "real" in row:
        return sympy.Float(float(row["real"]))
    return _RELATIONS[row["relation"]](*map(expression_from_json, row["of"]))


def _identifier(name: str) -> str:
    # sympy makes code of its symbols.
    if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
        raise ValueError(f"expected the name of a size, got {name!r}")
    return name
