"""The product with constant fan-in on the GPU: that of ``csr._triton``, whose rows then need no pointers."""

from torch import Tensor

from fxsparse.kernels.csr._triton import Rows, linear
from fxsparse.kernels.library import check_input


def forward(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    active_rows: Tensor | None,
    empty_rows: Tensor | None,
    in_features: int,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
) -> Tensor:
    """``fxsparse::condensed_forward``; rows without entries are written in the same launch."""
    check_input(x, values, in_features)
    if active_rows is None or empty_rows is None:
        active_rows = empty_rows = None
    weight = Rows(values, indices, None, active_rows, empty_rows)
    return linear(x, weight, bias, activation, residual)
