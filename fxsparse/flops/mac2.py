"""``mac2``: a FLOP is a multiplication or an addition, two per multiply-add; nothing else is counted."""

from sympy import Expr

from fxsparse.flops.site import CallSite


def mac2(site: CallSite, nnz: Expr) -> Expr:
    """FLOPs of one forward with `nnz` entries of the weight; biases, norms and activations are free."""
    return 2 * (site.uses * nnz if site.is_weight_site else site.products)
