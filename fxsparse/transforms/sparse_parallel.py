"""Sparse Parallel: the sum of k sparse branches in the place of a layer."""

from dataclasses import dataclass
from typing import ClassVar

from fxsparse.transforms.choices import check_flag, check_match, check_sigma, globs
from fxsparse.transforms.iso_flop import branches, nearest_branches


@dataclass(frozen=True)
class SparseParallel:
    """Replace a layer by ``sum_j sigma(theta_j z)`` over k = 1 / (1 - s) branches, arXiv:2303.11525 section 3.2.

    Args:
        sigma: what follows every branch: "norm+relu" (the paper's non-linearity; the reference's ImageNet models),
            "norm" (its CIFAR models; in inference the branches then add up to one layer), "relu" or "none".  A
            BatchNorm right behind the layer goes into the branches, a copy each.
        adjust: take the nearest sparsity 1 - 1/k where k would be no integer, instead of refusing the plan's.
        keep: globs of layers that become sparse and stay one layer, as shortcuts do in the reference.
        match: as for SparseWide.
    """

    name: ClassVar[str] = "sparse-parallel"
    sigma: str = "norm+relu"
    adjust: bool = False
    keep: tuple[str, ...] = ()
    match: str = "layers"

    def __post_init__(self) -> None:
        check_sigma(self.sigma, "SparseParallel")
        check_flag(self.adjust, "SparseParallel.adjust")
        object.__setattr__(self, "keep", globs(self.keep, "SparseParallel.keep"))
        check_match(self.match, "SparseParallel")

    def branches(self, sparsity: float) -> int:
        """How many branches a layer becomes; PlanError where that is no integer and `adjust` is off."""
        return nearest_branches(sparsity) if self.adjust else branches(sparsity)
