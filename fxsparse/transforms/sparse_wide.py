"""Sparse Wide: every layer wider, and sparse."""

from dataclasses import dataclass
from typing import ClassVar

from fxsparse.transforms.choices import check_choice, check_match

HEADS = ("fixed", "grow")


@dataclass(frozen=True)
class SparseWide:
    """Widen the whole network by k = sqrt(1 / (1 - s)), arXiv:2303.11525 section 3.1; inputs and outputs keep shape.

    The first width becomes ``floor(k * width)``, and widths that are multiples of it stay so, as in the reference's
    ResNets; others are rounded down by themselves.  Where a width is cut into heads it is rounded up to a multiple of
    them, as in the reference's GPT configurations.

    Args:
        heads: "fixed" keeps the number of attention heads, and heads get wider (the reference); "grow" keeps their
            width, and there are more.
        match: which FLOPs the sparsity is solved for: of the transformed "layers", of the whole "model", or "nominal"
            to take the plan's sparsity as it is.

    Raises:
        PlanError: a field out of range.
    """

    name: ClassVar[str] = "sparse-wide"
    heads: str = "fixed"
    match: str = "layers"

    def __post_init__(self) -> None:
        check_choice(self.heads, HEADS, "SparseWide.heads")
        check_match(self.match, "SparseWide")
