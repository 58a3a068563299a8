"""What an einsum does to the sizes of its axes."""

from torch.fx import Node

from fxsparse.channels.dependency import Tie
from fxsparse.channels.reading import Reader
from fxsparse.channels.rules import Step, title
from fxsparse.einsum import Label, einsum_call, labels


def einsum_step(reader: Reader, node: Node) -> Step | None:
    """Dimensions of one letter are one; those that are summed over may have any size."""
    operands, read, made = einsum_labels(reader, node) or ([], [], [])
    if not operands:
        return None
    ties: list[Tie] = []
    first: dict[Label, tuple[Node, int]] = {}
    for x, of in zip(operands, read, strict=True):
        for dim, label in enumerate(of):
            if label in made:
                ties += reader.tie(x, dim, node, made.index(label))
            elif (x, dim) != (seen := first.setdefault(label, (x, dim))):
                ties += reader.tie(*seen, x, dim)
    free = [
        reader.axis(x, dim) for x, of in zip(operands, read, strict=True) for dim in _alone(of, read, made)
    ]
    return Step(ties, free=free, reason=f"{title(reader, node)} broadcasts it")


def einsum_labels(reader: Reader, node: Node) -> tuple[list[Node], list[list[Label]], list[Label]] | None:
    """(operands, labels of their dimensions, labels of the result's); None where the call does not tell."""
    equation, operands = einsum_call(node.args)
    if not all(isinstance(x, Node) for x in operands):
        return None
    return operands, *labels(equation, [reader.rank(x) for x in operands])


def _alone(of: list[Label], read: list[list[Label]], made: list[Label]) -> list[int]:
    """Dimensions of an operand whose label nothing else has."""
    every = [label for operand in read for label in operand] + made
    return [dim for dim, label in enumerate(of) if every.count(label) == 1]
