"""``rigl``: the counting behind RigL's published tables (arXiv:1911.11134), quirks included.

Every convolution pays a bias and a ReLU per output whether it has them or not; its output size is that of
"same" padding; a depthwise one has a single output channel, and a linear layer pays its bias.  The density is
what the allocation aims at, a real number.  Nothing else is counted: no norm, pooling or addition.
"""

from collections.abc import Iterable
from math import prod

from sympy import Expr, Integer, ceiling

from fxsparse.flops.site import CallSite


def rigl(site: CallSite, nnz: Expr) -> Expr:
    """FLOPs of one forward with `nnz` entries of the weight."""
    if not site.is_weight_site:
        return 2 * site.products
    if site.op == "linear":
        # n products and n - 1 additions per output, n its fan-in, and the bias's addition.
        return 2 * site.uses * nnz
    if site.op.startswith("conv_transpose"):
        return 2 * site.uses * nnz + prod(site.output, start=Integer(1))
    positions = site.batch * prod(_outputs(site), start=Integer(1))
    channels, per_group, *_ = site.weight_shape
    outputs = positions * (1 if site.groups > 1 and per_group == 1 else channels)
    # (v products + v - 1 additions + bias + ReLU) per output, v the fan-in.
    return 2 * positions * nnz + outputs


def rigl_bytes(weights: Iterable[tuple[tuple[int, ...], float]]) -> float:
    """Bytes of a model from (shape, nnz) of each weight; the tables' "MB" are 10^6 of them.

    Four bytes per nonzero and per output's bias, and one mask bit per entry where there are zeros.
    """
    bits = 0.0
    for shape, nnz in weights:
        outputs, per_group, *kernel = shape
        bits += 32 * (nnz + (1 if kernel and per_group == 1 else outputs))
        bits += prod(shape) if nnz < prod(shape) else 0
    return bits / 8


def _outputs(site: CallSite) -> list[Expr]:
    kernel = site.weight_shape[2:]
    sizes = site.operands[0][len(site.operands[0]) - len(kernel) :]
    return [
        ceiling((size - k + 1 + 2 * (k // 2)) / Integer(stride))
        for size, k, stride in zip(sizes, kernel, site.stride, strict=True)
    ]
