"""Sparse Doped: a sparse layer beside a dense one of low rank."""

from dataclasses import dataclass
from typing import ClassVar

from fxsparse.transforms.choices import check_choice, check_match, check_sigma, globs

LOW_RANK = ("dense", "sparse")


@dataclass(frozen=True)
class SparseDoped:
    """Replace a layer by ``V U z + sigma(theta z)``, theta sparse, arXiv:2303.11525 section 3.4.

    The rank is d = s D_in D_out / (D_in + D_out), rounded down.  Of a convolution, U has its kernel and stride and V
    is 1 x 1.

    Args:
        sigma: what follows theta: "none" (the reference), "norm+relu", "norm" or "relu".
        low_rank: "dense" as in the paper, or "sparse" as the reference implementation runs it: U and V are masked at s
            too, which leaves 0.75, 0.44 and 0.19 of the FLOPs of a CIFAR ResNet-18 at s = 0.5, 0.75 and 0.9.
        keep: globs of layers that become sparse and stay one layer, as shortcuts do in the reference.
        match: as for SparseWide; with sparse factors "nominal" is what happens, since no s makes that iso-FLOP.
    """

    name: ClassVar[str] = "sparse-doped"
    sigma: str = "none"
    low_rank: str = "dense"
    keep: tuple[str, ...] = ()
    match: str = "layers"

    def __post_init__(self) -> None:
        check_sigma(self.sigma, "SparseDoped")
        check_choice(self.low_rank, LOW_RANK, "SparseDoped.low_rank")
        object.__setattr__(self, "keep", globs(self.keep, "SparseDoped.keep"))
        check_match(self.match, "SparseDoped")
