"""Round the values of weights whose kernel stores them in fewer bytes, and measure what that costs."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fxsparse import choosing, kernel
from fxsparse.graph import Site, bias_of, sites
from fxsparse.kernel import Kernel
from fxsparse.packed import replace_parameter
from fxsparse.passes.select_kernels import matrix_of, site_inputs, site_problem
from fxsparse.pipeline import PassContext


@dataclass(frozen=True)
class RoundValues:
    """A weight decided for int8 or bfloat16 values becomes what those stand for; ``values_error`` is filled in.

    So the pass that packs them, and all that follow, preserve the function.  Weights by their entries are rounded in
    ``ctx.entries``, without an error: their exact product is not there to be compared with.
    """

    name: ClassVar[str] = "round-values"
    after: ClassVar[tuple[str, ...]] = ("select-kernels", "select-entry-kernels")
    preserves_function: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Returns the number of rounded weights."""
        narrow = {
            name: decision for name, decision in ctx.decisions.items() if decision.values_dtype is not None
        }
        found = {name: sites(gm, name) for name in narrow if name not in ctx.entries}
        inputs = site_inputs(gm, ctx, [site.node for calls in found.values() for site in calls])
        for name, decision in narrow.items():
            taken = kernel.registered()[decision.kernel]
            if name in ctx.entries:
                ctx.entries[name] = choosing.stored(taken, ctx.entries[name])
                continue
            decision.values_error = max(
                _error(gm, taken, site, inputs[site.node], decision.nnz) for site in found[name]
            )
            site = found[name][0]
            rounded = choosing.stored(taken, matrix_of(gm, site)).to(ctx.weights[name].dtype)
            replace_parameter(gm, name, rounded.t().contiguous() if site.transposed else rounded)
        return len(narrow)


def _error(gm: GraphModule, taken: Kernel, site: Site, x, nnz: int) -> float:
    bias, weight = bias_of(gm, site), matrix_of(gm, site)
    return choosing.rounding_error(taken, site_problem(site, weight, x, nnz), x, weight, bias, "none")
