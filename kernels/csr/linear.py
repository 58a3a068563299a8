"""Linear layers with a CSR weight: forward, gradients at the stored coordinates, and their kernel entries."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fxsparse.formats import csr
from fxsparse.kernel import TRAINING, TRAINING_ON_GPU, Cost, Entries, Kernel, Problem, register
from fxsparse.kernels import cpu, gpu, probe
from fxsparse.kernels.csr import reference
from fxsparse.kernels.library import (
    ACTIVATIONS,
    autocast_stored,
    check_input,
    define,
    is_compiled,
    on_gpu,
    with_epilogue,
)

_BACKWARD_ARGUMENTS = (
    "(Tensor grad, Tensor x, Tensor values, Tensor crow, Tensor cols, Tensor ccol, Tensor rows_t, "
    "Tensor perm, bool need_x, bool need_values, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def csr_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    ccol: Tensor | None = None,
    rows_t: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    probe_key: int = -1,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    in_features: int | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` with W [out, in] in CSR; sums in fp32 (fp64 for fp64).

    x [..., in] and values [capacity] are of one floating dtype; every index is int32: crow [out + 1],
    cols [capacity] (without gradients also int16; ascending in every row).  Only the first ``crow[-1]`` entries
    are read; the rest gets the gradient 0.
    With the transposed index (ccol [in + 1], rows_t, perm [capacity]; ``formats.csr.CsrIndex``) the result
    is differentiable in x, values and bias, and no tensor of W's size is made.  Without it there is no
    gradient, and `in_features` says how wide W is.  With ``probe_key >= 0`` backward leaves copies of x and the output
    gradient in ``probe.PROBES[probe_key]``.  An activation, a residual [..., out] and `scales` (``formats.narrow``) go
    with inference only.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
        ValueError: neither the transposed index nor `in_features`, or an activation with gradients.
    """
    x, values, scales, bias = autocast_stored(x, values, scales, bias)
    if ccol is None:
        if in_features is None:
            raise ValueError("csr_linear without the transposed index: expected in_features, got None")
        return with_epilogue(
            _forward, x, (values, crow, cols, in_features), bias, activation, residual, scales
        )
    if activation != "none" or residual is not None:
        raise ValueError(
            f"the differentiable CSR linear fuses no activation and no residual, got {activation!r}: apply it after"
        )
    return _CsrLinear.apply(x, values, crow, cols, ccol, rows_t, perm, bias, probe_key)


class _CsrLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, crow, cols, ccol, rows_t, perm, bias, probe_key):
        ctx.save_for_backward(x, values, crow, cols, ccol, rows_t, perm)
        ctx.probe_key = probe_key
        return _forward(x, values, crow, cols, ccol.shape[0] - 1, bias, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *weight = ctx.saved_tensors
        need_x, need_values, need_bias = (ctx.needs_input_grad[i] for i in (0, 1, 7))
        if ctx.probe_key >= 0:
            grad = probe.stash(x, grad, ctx.probe_key)
        op = torch.ops.fxsparse.csr_backward.default
        run: Any = op if is_compiled(x) else reference.linear_backward
        grad_x, grad_values, grad_bias = run(grad, x, *weight, need_x, need_values, need_bias)
        return (
            grad_x if need_x else None,
            grad_values if need_values else None,
            *(None,) * 5,
            grad_bias if need_bias else None,
            None,
        )


def _forward(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    cols: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """The op, or for fp64 its reference: the compiled kernels sum in fp32."""
    run = torch.ops.fxsparse.csr_forward.default if is_compiled(x) else reference.linear
    return run(x, values, crow, cols, in_features, bias, activation, residual, scales)


def _forward_fake(x, values, crow, cols, in_features, bias, activation, residual=None, scales=None):
    check_input(x, values, in_features, scales)
    return x.new_empty(*x.shape[:-1], crow.shape[0] - 1)


def _backward_fake(grad, x, values, crow, cols, ccol, rows_t, perm, need_x, need_values, need_bias):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        values.new_empty(values.shape if need_values else (0,)),
        grad.new_empty(grad.shape[-1:] if need_bias else (0,)),
    )


define(
    "csr_forward(Tensor x, Tensor values, Tensor crow, Tensor cols, int in_features, Tensor? bias, "
    "int activation, Tensor? residual=None, Tensor? scales=None) -> Tensor",
    reference.linear,
    _forward_fake,
)
define("csr_backward" + _BACKWARD_ARGUMENTS, reference.linear_backward, _backward_fake)


def _forward_on_gpu(*args):
    from fxsparse.kernels.csr import _triton

    return _triton.forward(*args)


def _backward_on_gpu(*args):
    from fxsparse.kernels.csr import backward_triton

    return backward_triton.backward(*args)


on_gpu("csr_forward", _forward_on_gpu)
on_gpu("csr_backward", _backward_on_gpu)


# Formulas see shapes only, so they count every slot of the capacity.
@register_flop_formula(torch.ops.fxsparse.csr_forward)
def _forward_flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * values_shape[0] * torch.Size(x_shape[:-1]).numel()


@register_flop_formula(torch.ops.fxsparse.csr_backward)
def _backward_flops(grad_shape, x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:
    need_x, need_values, _ = args[-3:]
    return (need_x + need_values) * 2 * values_shape[0] * torch.Size(x_shape[:-1]).numel()


def _pack_inference(weight: Tensor) -> Mapping[str, Tensor]:
    index = csr.from_mask(weight != 0)
    narrow = torch.int16 if weight.shape[1] <= 32767 else torch.int32
    return {
        "values": csr.values_of(weight, index),
        "crow": index.crow,
        "cols": index.cols.to(narrow, copy=True),
    }


def _pack_entries_inference(entries: Entries) -> Mapping[str, Tensor]:
    narrow = torch.int16 if entries.shape[1] <= 32767 else torch.int32
    return {
        "values": entries.values,
        "crow": csr.pointers(entries.indices[0], entries.shape[0]),
        "cols": entries.indices[1].to(narrow, copy=True),
    }


def csr_infer(
    x,
    bias,
    values,
    crow,
    cols,
    scales: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    *,
    in_features: int,
) -> Tensor:
    """`csr_linear` without gradients, in the argument order of ``Kernel.run``."""
    return csr_linear(
        x,
        values,
        crow,
        cols,
        bias=bias,
        activation=activation,
        residual=residual,
        in_features=in_features,
        scales=scales,
    )


def _reference_inference(
    x, bias, values, crow, cols, scales=None, activation: str = "none", residual=None, *, in_features: int
) -> Tensor:
    code = ACTIVATIONS.index(activation)
    return reference.linear(x, values, crow, cols, in_features, bias, code, residual, scales)


def _pack_training(weight: Tensor) -> Mapping[str, Tensor]:
    index = csr.from_mask(weight != 0)
    return {"values": csr.values_of(weight, index), **_parts(index)}


def _pack_entries_training(entries: Entries) -> Mapping[str, Tensor]:
    shape = (entries.shape[0], entries.shape[1])
    return {
        "values": entries.values,
        **_parts(csr.from_flat(csr.positions_in(entries.indices, shape), shape)),
    }


def _parts(index: csr.CsrIndex) -> Mapping[str, Tensor]:
    return {name: getattr(index, name) for name in ("crow", "cols", "ccol", "rows_t", "perm")}


def csr_train(
    x,
    bias,
    values,
    crow,
    cols,
    ccol,
    rows_t,
    perm,
    activation: str = "none",
    probe_key: int = -1,
    in_features: int | None = None,
) -> Tensor:
    """`csr_linear` with gradients, in the argument order of ``Kernel.run``; `ccol` says `in_features`, too."""
    return csr_linear(x, values, crow, cols, ccol, rows_t, perm, bias, probe_key)


def _reference_training(
    x, bias, values, crow, cols, ccol, rows_t, perm, activation: str = "none", in_features: int | None = None
) -> Tensor:
    return reference.linear(x, values, crow, cols, ccol.shape[0] - 1, bias, 0)


def _refuses_inference(problem: Problem) -> list[str]:
    return cpu.refuses(problem) + (["it has no gradient: cpu-csr-train has"] if problem.training else [])


def _refuses_training(problem: Problem) -> list[str]:
    return cpu.refuses(problem) + (
        [] if problem.training else ["it is for training: cpu-csr needs less memory"]
    )


def _refuses_inference_on_gpu(problem: Problem) -> list[str]:
    return gpu.refuses(problem) + (["it has no gradient: cuda-csr-train has"] if problem.training else [])


def _refuses_training_on_gpu(problem: Problem) -> list[str]:
    return gpu.refuses(problem) + (
        [] if problem.training else ["it is for training: cuda-csr needs less memory"]
    )


def _cost_inference(problem: Problem) -> Cost:
    index_bytes = 2 if problem.shape[1] <= 32767 else 4
    return Cost(2 * problem.batch * problem.nnz, problem.nnz * (problem.dtype.itemsize + index_bytes))


def _cost_training(problem: Problem) -> Cost:
    return Cost(6 * problem.batch * problem.nnz, problem.nnz * (problem.dtype.itemsize + 4))


CSR = register(
    Kernel(
        "cpu-csr",
        "linear",
        "csr",
        _pack_inference,
        csr_infer,
        _reference_inference,
        _refuses_inference,
        _cost_inference,
        _pack_entries_inference,
    )
)
CSR_TRAIN = register(
    Kernel(
        TRAINING["linear"],
        "linear",
        "csr",
        _pack_training,
        csr_train,
        _reference_training,
        _refuses_training,
        _cost_training,
        _pack_entries_training,
    )
)
CSR_ON_GPU = register(replace(CSR, name="cuda-csr", refuses=_refuses_inference_on_gpu))
CSR_TRAIN_ON_GPU = register(
    replace(CSR_TRAIN, name=TRAINING_ON_GPU["linear"], refuses=_refuses_training_on_gpu)
)
