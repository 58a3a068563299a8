"""What GPU kernels do with a sum before they write it: bias, residual and activation."""

import triton
import triton.language as tl


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation at that position of kernels.library.ACTIVATIONS, fp32 in and out; NaN passes, as in torch."""
    if ACTIVATION == 1:
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == 3:
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == 4:
        y = y * tl.sigmoid(y)
    elif ACTIVATION == 5:
        y = tl.where(y < 0, 0.0, tl.where(y > 6, 6.0, y))
    elif ACTIVATION == 6:
        gate = y + 3
        y = y * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    return y
