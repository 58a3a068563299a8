"""The subscripts of an einsum, dimension by dimension."""

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

Label = str | int
"""A letter, or, for what an ellipsis stands for, a dimension counted from its last: -1, -2 and so on."""


def einsum_call(arguments: Sequence[Any]) -> tuple[str, list[Any]]:
    """(equation, operands) of a call of ``torch.einsum``, which takes subscripts as lists of numbers too."""
    first, *rest = arguments
    if isinstance(first, str):
        return first, list(rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest)
    pairs = len(arguments) // 2 * 2
    made = f"->{_spelled(arguments[-1])}" if len(arguments) > pairs else ""
    return ",".join(map(_spelled, arguments[1:pairs:2])) + made, list(arguments[:pairs:2])


def labels(equation: str, ranks: Sequence[int]) -> tuple[list[list[Label]], list[Label]]:
    """(labels of the dimensions of every operand, those of the result) of ``torch.einsum(equation, ...)``.

    `ranks`: numbers of dimensions of the operands.  Without ``->`` the result has the ellipsis and then, sorted, the
    letters that are there once, as torch has it.
    """
    read, arrow, made = equation.replace(" ", "").partition("->")
    operands = [_expanded(term, rank) for term, rank in zip(read.split(","), ranks, strict=True)]
    longest = max((sum(isinstance(label, int) for label in of) for of in operands), default=0)
    if not arrow:
        times = Counter(label for of in operands for label in of if isinstance(label, str))
        made = "..." + "".join(sorted(letter for letter, n in times.items() if n == 1))
    return operands, _expanded(made, longest + len(made.replace("...", "")))


def _spelled(subscripts: Sequence[Any]) -> str:
    letters = string.ascii_uppercase + string.ascii_lowercase
    return "".join("..." if subscript is ... else letters[subscript] for subscript in subscripts)


def _expanded(term: str, rank: int) -> list[Label]:
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *range(-hidden, 0), *after]
