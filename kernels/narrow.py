"""Inference kernels of linear layers again, on values in fewer bytes: int8 with a scale for each row, or bfloat16.

Inputs, sums and outputs are as without; a value is widened in a register.  Where the weight comes from L3 or memory a
call takes as long as its bytes do.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fxsparse.formats import narrow
from fxsparse.kernel import Cost, Entries, Kernel, Problem, packed, register, register_glue, registered
from fxsparse.kernels.csr.linear import CSR, CSR_ON_GPU
from fxsparse.kernels.lookup.linear import LOOKUP
from fxsparse.kernels.nm_lanes.linear import NM_LANES
from fxsparse.kernels.strided.linear import STRIDED
from fxsparse.kernels.striped.linear import STRIPED


def narrowed(kernel: Kernel, name: str) -> Kernel:
    """`kernel` with values in ``narrow.DTYPES[name]``; its buffers are followed by the scales of its rows."""
    dtype = narrow.DTYPES[name]

    def pack(weight: Tensor) -> Mapping[str, Tensor]:
        values, scales = narrow.rounded(weight, dtype)
        return _with_scales(kernel.pack(values), scales)

    def pack_entries(entries: Entries) -> Mapping[str, Tensor]:
        rows = entries.indices[0]
        values, scales = narrow.rounded_entries(entries.values, rows, entries.shape[0], dtype)
        kept = values != 0
        assert kernel.pack_entries is not None
        packed = kernel.pack_entries(Entries(values[kept], entries.indices[:, kept], entries.shape))
        return _with_scales(packed, scales)

    def refuses(problem: Problem) -> list[str]:
        same = [f"the weight is in {name} as it is"] if problem.dtype == dtype else []
        return kernel.refuses(problem) + same

    def cost(problem: Problem) -> Cost:
        whole = kernel.cost(problem)
        return Cost(whole.flops, whole.bytes - problem.nnz * (problem.dtype.itemsize - dtype.itemsize))

    return replace(
        kernel,
        name=f"{kernel.name}-{name}",
        values=dtype,
        pack=pack,
        refuses=refuses,
        cost=cost,
        pack_entries=kernel.pack_entries and pack_entries,
    )


def _with_scales(packed: Mapping[str, Tensor], scales: Tensor) -> Mapping[str, Tensor]:
    """Rows are in the order of ``active_rows`` where the format has it."""
    order = packed.get("active_rows")
    return {**packed, "scales": scales if order is None else scales[order.long()]}


@register_glue
def pack_rounded(kernel: Kernel, values: Tensor | Entries, scales: Tensor) -> Mapping[str, Tensor]:
    """The buffers of a `narrowed` kernel for `values` that are rounded already, and the scales of the rows."""
    whole = registered()[kernel.name.rpartition("-")[0]]
    return _with_scales(packed(whole, values), scales)


NARROW = tuple(
    register(narrowed(kernel, name))
    for name in narrow.DTYPES
    for kernel in (CSR, LOOKUP, STRIPED, NM_LANES, STRIDED)
)
NARROW_ON_GPU = tuple(register(narrowed(CSR_ON_GPU, name)) for name in narrow.DTYPES)
