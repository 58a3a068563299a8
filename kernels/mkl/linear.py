"""The dense product of MKL for inference, on a weight that it packed once; ``F.linear`` packs it at every call."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels.library import (
    activate,
    activation_code,
    autocast,
    check_added,
    check_input,
    dense_product,
    refuse_gradient,
)
from fxsparse.kernels.second_copy import can_have_one, second_copy

IS_AVAILABLE = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def mkl_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """``activation(F.linear(x, weight, bias))``; inference only.

    x [..., in], weight [out, in] and bias [out] are float32 on the CPU; other inputs, and those that torch.compile
    sees, which packs weights itself where it freezes them, go through ``F.linear``.  The first call keeps a second copy
    of the weight, packed for as many rows as x has, for as long as the weight is there; a change of the weight that
    PyTorch counts makes it anew.  Calls with another number of rows go through ``F.linear``, too.

    Raises:
        UnsupportedError: an input that requires a gradient.
        RuntimeError: an x of another width or dtype than the weight's, or a bias of another size.
        ValueError: an unknown activation.
    """
    refuse_gradient(x, weight, bias)
    x, weight, bias = autocast(x, weight, bias)
    activation_code(activation)
    check_input(x, weight, weight.shape[1])
    check_added(x, weight.shape[0], bias, None)
    if torch.compiler.is_compiling() or not _is_plain(x, weight):
        return activate(F.linear(x, weight, bias), activation)
    packed, rows = second_copy(_PACKED, weight, None, lambda: _packed(weight, x.shape[:-1].numel()))
    return activate(torch.ops.mkl._mkl_linear.default(x, packed, weight, bias, rows), activation)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    is_rows = x.is_cpu and x.dtype == torch.float32 and x.numel() > 0 and x.dim() > 1
    return IS_AVAILABLE and is_rows and type(x) is Tensor and can_have_one(weight)


def _packed(weight: Tensor, rows: int) -> tuple[Tensor, int]:
    return torch.ops.mkl._mkl_reorder_linear_weight.default(weight.detach().contiguous(), rows), rows


if IS_AVAILABLE:

    @register_flop_formula(torch.ops.mkl._mkl_linear)
    def _flops(x_shape, packed_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * torch.Size(weight_shape).numel() * torch.Size(x_shape[:-1]).numel()


def _pack(weight: Tensor) -> Mapping[str, Tensor]:
    return {"weight": weight}


def _run(x, bias, weight, activation: str = "none", *, in_features: int | None = None) -> Tensor:
    return mkl_linear(x, weight, bias, activation)


def _reference(x, bias, weight, activation: str = "none", *, in_features: int | None = None) -> Tensor:
    check_input(x, weight, weight.shape[1])
    return dense_product(x, weight, bias, activation_code(activation))


def _refuses(problem: Problem) -> list[str]:
    reasons = {
        "it has no gradient": problem.training,
        f"it runs on cpu, not {problem.device.type}": problem.device.type != "cpu",
        f"it has float32, not {str(problem.dtype).removeprefix('torch.')}": problem.dtype != torch.float32,
        "this PyTorch was built without MKL": not IS_AVAILABLE,
    }
    return [reason for reason, holds in reasons.items() if holds]


def _cost(problem: Problem) -> Cost:
    numel = problem.shape[0] * problem.shape[1]
    return Cost(2 * problem.batch * numel, numel * problem.dtype.itemsize)


MKL = register(Kernel("mkl", "linear", "dense", _pack, _run, _reference, _refuses, _cost))
