"""Sizes that keep FLOPs: widths, branches and ranks in closed form, on the decimals that sparsities are written as.

arXiv:2303.11525, section 3: a layer of D_in x D_out has as many multiplications as its replacement of sparsity s.
"""

from fractions import Fraction
from math import ceil, floor, isqrt

from fxsparse.errors import PlanError


def density(sparsity: float) -> Fraction:
    """1 - s without rounding: 1/10 for 0.9, where ``1 - 0.9`` is a little more."""
    return 1 - Fraction(repr(float(sparsity)))


def widened(width: int, sparsity: float) -> int:
    """``floor(k * width)`` for the width factor k = sqrt(1 / (1 - s)) of Sparse Wide, without rounding before."""
    return isqrt(floor(width**2 / density(sparsity)))


def widening_sparsity(width: int) -> float:
    """The smallest sparsity of four decimals at which `widened` gives more than the width."""
    return ceil(10**4 * (1 - Fraction(width, width + 1) ** 2)) / 10**4


def branches(sparsity: float) -> int:
    """Give k = 1 / (1 - s), the number of branches of Sparse Parallel.

    Raises:
        PlanError: k is no integer; the message has the nearest sparsities where it is.
    """
    wanted = 1 / density(sparsity)
    if wanted.denominator != 1:
        low, high = floor(wanted), ceil(wanted)
        raise PlanError(
            f"SparseParallel: expected a sparsity 1 - 1/k with an integer k of branches, got {sparsity}, where k would "
            f"be {float(wanted):.4g}: {low} branches have {low * float(density(sparsity)):.4g} of the dense FLOPs, "
            f"{high} have {high * float(density(sparsity)):.4g}. The nearest feasible sparsities are "
            f"{1 - 1 / low:.6g} (k={low}) and {1 - 1 / high:.6g} (k={high}); adjust=True takes the nearer one."
        )
    return int(wanted)


def nearest_branches(sparsity: float) -> int:
    """The k whose sparsity 1 - 1/k is nearest to the one given; of two, the sparser."""
    wanted = 1 / density(sparsity)
    return min((ceil(wanted), floor(wanted)), key=lambda k: abs(Fraction(1, k) - 1 / wanted))


def factorized_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """The inner width d of Sparse Factorized, rounded up: d (D_in + D_out) (1 - s) = D_in D_out.

    `inputs` counts the positions of the kernel too: U is a convolution with the kernel of the layer, V a 1 x 1 one.
    """
    return ceil(inputs * outputs / ((inputs + outputs) * density(sparsity)))


def doped_rank(inputs: int, outputs: int, sparsity: float) -> int:
    """The rank d of Sparse Doped, rounded down: d (D_in + D_out) = s D_in D_out; `inputs` as for `factorized_rank`."""
    return floor((1 - density(sparsity)) * inputs * outputs / (inputs + outputs))


def exact_sparsity(budget: int, fixed: int, sparsifiable: int) -> float:
    """s* = 1 - (budget - fixed) / sparsifiable: the one sparsity at which all of it costs the budget.

    Args:
        budget: FLOPs that there are to spend.
        fixed: FLOPs that no sparsity changes.
        sparsifiable: FLOPs, when dense, of what becomes sparse.

    Raises:
        PlanError: no sparsity in [0, 1) does.
    """
    if not 0 < budget - fixed <= sparsifiable:
        raise PlanError(
            f"no sparsity makes this iso-FLOP: expected {fixed:,} FLOPs that stay and up to {sparsifiable:,} that may "
            f"become sparse to meet {budget:,}; {'they are too few' if budget > fixed else 'what stays is too much'}."
        )
    return float(1 - Fraction(budget - fixed, sparsifiable))
