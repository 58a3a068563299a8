"""SparseGPT: one-shot pruning that makes up for each removed weight in those to its right."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fxsparse.errors import PlanError
from fxsparse.method import Method, register
from fxsparse.options import is_integer, is_number
from fxsparse.pattern import Pattern
from fxsparse.reconstruction import reconstruct
from fxsparse.reparam import HardMask
from fxsparse.scores import magnitude


@dataclass(frozen=True)
class Reconstruct:
    """`fxsparse.reconstruction.reconstruct` with the paper's score, ``w ** 2 / [H^-1]_jj`` of the columns left."""

    damping: float = 0.01
    columns: int = 128
    products: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not is_number(self.damping) or self.damping < 0:
            raise PlanError(f"expected damping as a number >= 0, got {self.damping!r}. The paper has 0.01.")
        if not is_integer(self.columns, 1):
            raise PlanError(f"expected columns as an integer >= 1, got {self.columns!r}. The paper has 128.")

    def __call__(self, matrix: Tensor, moments: Tensor, pattern: Pattern, nnz: int) -> tuple[Tensor, str]:
        made = reconstruct(matrix, 2 * moments, pattern, nnz, damping=self.damping, width=self.columns)
        return made.matrix, made.note


@register
def sparsegpt(damping: float = 0.01, columns: int = 128) -> Method:
    """Prune columns in turn, making up for each in those that follow: Frantar and Alistarh 2023, arXiv:2301.00774.

    A method of ``fxsparse.prune(model, plan, calibration=batches)``; it does not train.  For every weight it holds a
    matrix of fan-in x fan-in.  Counts are exact, where the authors' code removes one entry more in every block of
    columns; and a column that saw only zeros is the first to go, but keeps its values where the mask keeps it, where
    the code zeroes it.  A plan's default allocation is the paper's, "uniform".

    Args:
        damping: times the mean of the diagonal, what is added to the diagonal of H.
        columns: among how many columns, over all rows, unstructured masks choose at a time.
    """
    return Method(
        "sparsegpt",
        HardMask(),
        magnitude,
        source="arXiv:2301.00774",
        allocation="uniform",
        one_shot=Reconstruct(damping, columns),
    )
