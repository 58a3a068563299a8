"""Inference of linear layers with constant fan-in, in the condensed layout; rows may be empty (ablated neurons)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import condensed
from fxsparse.kernel import Cost, Entries, Kernel, Problem, register
from fxsparse.kernels import cpu, gpu
from fxsparse.kernels.csr import reference as csr_reference
from fxsparse.kernels.library import (
    ACTIVATIONS,
    activate,
    autocast,
    check_input,
    define,
    is_compiled,
    on_gpu,
    scattered,
    with_epilogue,
)


def condensed_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    active_rows: Tensor | None = None,
    empty_rows: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    in_features: int,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` for W with k nonzeros in every row with any; inference only.

    x [..., in_features] and values [active, k] are of one floating dtype; indices [active, k] are columns, int16 or
    int32.  With active_rows int32 [active] and empty_rows int32 [out - active] the result is [..., out],
    ``activation(bias)`` where W has no entries; without them it is [..., active].

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    x, values, bias = autocast(x, values, bias)
    run = _FORWARD if is_compiled(x) else reference
    return with_epilogue(
        run, x, (values, indices, active_rows, empty_rows, in_features), bias, activation, residual
    )


def reference(
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
    """The same in plain PyTorch, differentiable."""
    check_input(x, values, in_features)
    active, k = values.shape
    crow = torch.arange(active + 1, device=values.device) * k
    weight = values.reshape(-1), crow, indices.reshape(-1).long()
    if active_rows is None or empty_rows is None:
        return csr_reference.product(x, *weight, bias, activation, residual)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = scattered(csr_reference.product(x.to(wide), *weight, None, 0), active_rows, empty_rows, None, 0)
    y = y if bias is None else y + bias
    return activate(y if residual is None else y + residual, ACTIVATIONS[activation]).to(x.dtype)


def _fake(x, values, indices, active_rows, empty_rows, in_features, bias, activation, residual=None):
    check_input(x, values, in_features)
    empty = 0 if empty_rows is None else empty_rows.shape[0]
    return x.new_empty(*x.shape[:-1], values.shape[0] + empty)


define(
    "condensed_forward(Tensor x, Tensor values, Tensor indices, Tensor? active_rows, Tensor? empty_rows, "
    "int in_features, Tensor? bias, int activation, Tensor? residual=None) -> Tensor",
    reference,
    _fake,
)


def _on_gpu(*args):
    from fxsparse.kernels.condensed import _triton

    return _triton.forward(*args)


on_gpu("condensed_forward", _on_gpu)

_FORWARD = torch.ops.fxsparse.condensed_forward.default  # once: the way through torch.ops takes 0.2 us


@register_flop_formula(torch.ops.fxsparse.condensed_forward)
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * values_shape.numel() * torch.Size(x_shape[:-1]).numel()


def _pack_entries(entries: Entries) -> Mapping[str, Tensor]:
    return condensed.pack_entries(entries.values, entries.indices, (entries.shape[0], entries.shape[1]))


def _run(
    x,
    bias,
    values,
    indices,
    active_rows=None,
    empty_rows=None,
    activation: str = "none",
    residual=None,
    *,
    in_features: int,
) -> Tensor:
    return condensed_linear(
        x, values, indices, bias, activation, active_rows, empty_rows, residual, in_features=in_features
    )


def _reference(
    x,
    bias,
    values,
    indices,
    active_rows=None,
    empty_rows=None,
    activation: str = "none",
    residual=None,
    *,
    in_features: int,
) -> Tensor:
    code = ACTIVATIONS.index(activation)
    return reference(x, values, indices, active_rows, empty_rows, in_features, bias, code, residual)


def _refuses(problem: Problem) -> list[str]:
    return cpu.refuses(problem) + _reasons(problem)


def _refuses_on_gpu(problem: Problem) -> list[str]:
    return gpu.refuses(problem) + _reasons(problem)


def _reasons(problem: Problem) -> list[str]:
    gradient = ["it has no gradient"] if problem.training else []
    return gradient + (["rows have different numbers of nonzeros"] if problem.fan_in is None else [])


def _cost(problem: Problem) -> Cost:
    index_bytes = 2 if problem.shape[1] <= 32767 else 4
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * (problem.dtype.itemsize + index_bytes))


CONDENSED = register(
    Kernel(
        "cpu-condensed",
        "linear",
        "condensed",
        condensed.pack,
        _run,
        _reference,
        _refuses,
        _cost,
        _pack_entries,
    )
)
CONDENSED_ON_GPU = register(replace(CONDENSED, name="cuda-condensed", refuses=_refuses_on_gpu))
