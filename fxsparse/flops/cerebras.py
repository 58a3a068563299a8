"""``cerebras``: the profiler behind Sparse-IFT's iso-FLOP budgets, quirks included.

A convolution saves one addition per layer and sample instead of one per output; norms are counted as if they
normalised by the batch at hand; max pooling and adaptive average pooling are counted; activations, residual
additions, plain average pooling, attention and products of activations are not.
"""

from math import prod

from sympy import Expr, Integer, floor

from fxsparse.flops.site import CallSite, Shape


def cerebras(site: CallSite, nnz: Expr) -> Expr:
    """FLOPs of one forward with `nnz` entries of the weight: additions, products, comparisons, roots."""
    if site.is_weight_site:
        adds, multiplies = _products(site)
        density = nnz / Integer(site.numel)
        bias = _numel(site.output) if site.bias else Integer(0)
        return _part(adds, density) + _part(multiplies, density) + bias
    return _norm_or_pool(site)


def cerebras_macs(site: CallSite) -> Expr:
    """What the profiler reports as dense MACs: multiplications alone, those of norms and pools included."""
    if site.is_weight_site:
        return _products(site)[1]
    size = _numel(site.operands[0])
    if site.op in ("batch_norm", "layer_norm"):
        return (3 if site.bias else 2) * size
    return _numel(site.output) if site.op == "adaptive_avg_pool" else Integer(0)


def _products(site: CallSite) -> tuple[Expr, Expr]:
    if site.op == "linear":
        out_features, in_features = site.weight_shape
        return site.uses * (in_features - 1) * out_features, site.uses * site.numel
    return site.uses * (site.numel - 1), site.uses * site.numel


def _norm_or_pool(site: CallSite) -> Expr:
    size, output = _numel(site.operands[0]), _numel(site.output)
    if site.op in ("batch_norm", "layer_norm"):
        groups = site.operands[0][1 if site.op == "batch_norm" else 0]
        # Two moments, then square, subtract, divide, root per group, and scale and shift.
        return 2 * (size - groups) + 3 * size + groups + (2 * size if site.bias else 0)
    if site.op == "max_pool":
        return output * (prod(site.kernel) - 1)
    if site.op == "adaptive_avg_pool":
        return output * (floor(size / output) - 1) + output
    return Integer(0)


def _part(count: Expr, density: Expr) -> Expr:
    return count if density == 1 else floor(count * density)


def _numel(shape: Shape) -> Expr:
    return prod(shape, start=Integer(1))
