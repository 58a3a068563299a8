"""Inference of linear layers by table lookups (AVX-512 VBMI), for any pattern; fastest for up to four tokens or so."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import lookup
from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels import cpu
from fxsparse.kernels.csr import reference as csr_reference
from fxsparse.kernels.library import (
    ACTIVATIONS,
    COMPILED,
    autocast_stored,
    check_input,
    define,
    with_epilogue,
)


def lookup_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    starts: Tensor,
    active_rows: Tensor,
    empty_rows: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    in_features: int,
    scales: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` [..., out], W from ``formats.lookup.pack``; inference only.

    x [..., in_features], values and residual [..., out] are of one floating dtype; values with `scales` [active], in
    the order of active_rows, are as ``formats.narrow`` has them.  Rows without entries give the
    activation of bias + residual.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    weight = values, columns, counts, starts, active_rows, empty_rows
    return _run(x, bias, *weight, scales, activation, residual, in_features=in_features)


def reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    counts: Tensor,
    starts: Tensor,
    active_rows: Tensor,
    empty_rows: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch, differentiable."""
    check_input(x, values, in_features, scales)
    entries = lookup.unpack(values, columns, counts, starts, active_rows, empty_rows)
    out_features = len(active_rows) + len(empty_rows)
    lengths = torch.bincount(entries.rows, minlength=out_features)
    crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if scales is not None:
        scales = scales.new_ones(out_features).index_put((active_rows.long(),), scales)
    return csr_reference.product(x, entries.values, crow, entries.columns, bias, activation, residual, scales)


def _fake(
    x,
    values,
    columns,
    counts,
    starts,
    active_rows,
    empty_rows,
    in_features,
    bias,
    activation,
    residual=None,
    scales=None,
):
    check_input(x, values, in_features, scales)
    return x.new_empty(*x.shape[:-1], active_rows.shape[0] + empty_rows.shape[0])


define(
    "lookup_forward(Tensor x, Tensor values, Tensor columns, Tensor counts, Tensor starts, Tensor active_rows, "
    "Tensor empty_rows, int in_features, Tensor? bias, int activation, Tensor? residual=None, "
    "Tensor? scales=None) -> Tensor",
    reference,
    _fake,
)

_FORWARD = torch.ops.fxsparse.lookup_forward.default  # once: the way through torch.ops takes 0.2 us


@register_flop_formula(torch.ops.fxsparse.lookup_forward)
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    """Of all slots, the empty ones too: shapes are all that a formula sees."""
    return 2 * values_shape.numel() * torch.Size(x_shape[:-1]).numel()


def _run(
    x,
    bias,
    values,
    columns,
    counts,
    starts,
    active_rows,
    empty_rows,
    scales: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    in_features: int,
) -> Tensor:
    x, values, scales, bias = autocast_stored(x, values, scales, bias)
    run = reference if x.dtype not in COMPILED else _FORWARD
    weight = values, columns, counts, starts, active_rows, empty_rows, in_features
    return with_epilogue(run, x, weight, bias, activation, residual, scales)


def _reference(
    x, bias, *packed, activation: str = "none", residual: Tensor | None = None, in_features: int
) -> Tensor:
    code = ACTIVATIONS.index(activation)
    return reference(x, *packed[:6], in_features, bias, code, residual, *packed[6:])


def _refuses(problem: Problem) -> list[str]:
    reasons = cpu.refuses(problem)
    if problem.training:
        reasons.append("it has no gradient")
    if not reasons and not cpu.has("avx512vbmi"):
        reasons.append("it needs AVX-512 VBMI")
    return reasons


def _cost(problem: Problem) -> Cost:
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * (problem.dtype.itemsize + 1))


LOOKUP = register(Kernel("cpu-lookup", "linear", "lookup", lookup.pack, _run, _reference, _refuses, _cost))
