"""Sparse Factorized: two sparse factors, and a non-linearity between them, in the place of a layer."""

from dataclasses import dataclass
from typing import ClassVar

from fxsparse.transforms.choices import check_match, check_sigma, globs


@dataclass(frozen=True)
class SparseFactorized:
    """Replace a layer by ``V sigma(U z)``, both sparse, arXiv:2303.11525 section 3.3.

    The inner width is d = D_in D_out / ((D_in + D_out) (1 - s)), rounded up.  Of a convolution, U has its kernel and
    stride and V is 1 x 1.

    Args:
        sigma: what lies between U and V: "norm+relu" (the reference's CIFAR models), "norm", "relu" or "none".
        keep: globs of layers that become sparse and stay one layer, as shortcuts do in the reference.
        match: as for SparseWide.
    """

    name: ClassVar[str] = "sparse-factorized"
    sigma: str = "norm+relu"
    keep: tuple[str, ...] = ()
    match: str = "layers"

    def __post_init__(self) -> None:
        check_sigma(self.sigma, "SparseFactorized")
        object.__setattr__(self, "keep", globs(self.keep, "SparseFactorized.keep"))
        check_match(self.match, "SparseFactorized")
