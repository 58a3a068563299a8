"""Inference of linear layers by stripes of columns that stay in L1, for any pattern; for 16 tokens and more."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import striped
from fxsparse.kernel import Cost, Entries, Kernel, Problem, register
from fxsparse.kernels import cpu
from fxsparse.kernels.library import (
    ACTIVATIONS,
    COMPILED,
    autocast_stored,
    check_input,
    define,
    dense_product,
    with_epilogue,
)


def striped_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    lengths: Tensor,
    starts: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` [..., out] for W from ``formats.striped.pack``; inference only.

    x [..., in], values and residual [..., out] are of one floating dtype; values with `scales` [out] are as
    ``formats.narrow`` has them.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    x, values, scales, bias = autocast_stored(x, values, scales, bias)
    run = reference if x.dtype not in COMPILED else _FORWARD
    weight = values, columns, rows, lengths, starts, dense
    return with_epilogue(run, x, weight, bias, activation, residual, scales)


def reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    lengths: Tensor,
    starts: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """The same in plain PyTorch on the dense weight, differentiable."""
    check_input(x, values, dense.shape[2], scales)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = torch.zeros(dense.shape[1:], dtype=wide, device=x.device)
    weight = weight.index_put(striped.positions(columns, rows, lengths, starts, dense), values.to(wide))
    weight = weight if scales is None else weight * scales.to(wide)[:, None]
    return dense_product(x, weight, bias, activation, residual)


def _fake(x, values, columns, rows, lengths, starts, dense, bias, activation, residual=None, scales=None):
    check_input(x, values, dense.shape[2], scales)
    return x.new_empty(*x.shape[:-1], dense.shape[1])


define(
    "striped_forward(Tensor x, Tensor values, Tensor columns, Tensor rows, Tensor lengths, Tensor starts, "
    "Tensor dense, Tensor? bias, int activation, Tensor? residual=None, Tensor? scales=None) -> Tensor",
    reference,
    _fake,
)

_FORWARD = torch.ops.fxsparse.striped_forward.default  # once: the way through torch.ops takes 0.2 us


@register_flop_formula(torch.ops.fxsparse.striped_forward)
def _flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * values_shape.numel() * torch.Size(x_shape[:-1]).numel()


def _run(
    x, bias, *packed, activation: str = "none", residual: Tensor | None = None, in_features: int | None = None
) -> Tensor:
    return striped_linear(x, *packed[:6], bias, activation, residual, *packed[6:])


def _reference(
    x, bias, *packed, activation: str = "none", residual: Tensor | None = None, in_features: int | None = None
) -> Tensor:
    return reference(x, *packed[:6], bias, ACTIVATIONS.index(activation), residual, *packed[6:])


def _refuses(problem: Problem) -> list[str]:
    return cpu.refuses(problem) + (["it has no gradient"] if problem.training else [])


def _cost(problem: Problem) -> Cost:
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * (problem.dtype.itemsize + 1))


def _pack_entries(entries: Entries) -> Mapping[str, Tensor]:
    return striped.pack_entries(entries.values, entries.indices, (entries.shape[0], entries.shape[1]))


STRIPED = register(
    Kernel(
        "cpu-striped",
        "linear",
        "striped",
        striped.pack,
        _run,
        _reference,
        _refuses,
        _cost,
        _pack_entries,
    )
)
