"""Inference of 2:4 linear layers on a GPU's sparse tensor cores: PyTorch's semi-structured tensors, by cuSPARSELt.

No training: the gradient of the input multiplies the transposed weight, which is 2:4 for masks alone that PyTorch draws
itself, in tiles of 4 x 4 (``prune_dense_static_sort``), and every step would have to compress new values.
"""

import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

from fxsparse.formats import nm
from fxsparse.kernel import Cost, Kernel, Problem, register
from fxsparse.kernels.library import ACTIVATIONS, activate, activation_code, check_input, refuse_gradient

DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 16
"""Of the rows and the columns of a weight; PyTorch pads tokens itself."""


def semi_structured_linear(
    x: Tensor,
    packed: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(x @ W^T + bias + residual)`` [..., out] for W from `pack`; inference only.

    x [..., in], bias and residual are of W's dtype; under autocast they are cast to it.

    Raises:
        RuntimeError: an x of another width or dtype than the weight's.
    """
    activation_code(activation)
    refuse_gradient(x, bias, residual)
    if torch.is_autocast_enabled(packed.device.type) and x.is_floating_point():
        x, bias, residual = x.to(packed.dtype), _cast(bias, packed), _cast(residual, packed)
    check_input(x, packed, dense.shape[2])
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(flat, _sparse(packed, dense), bias) if len(flat) else flat.new_empty(0, dense.shape[1])
    y = y.reshape(*x.shape[:-1], dense.shape[1])
    return activate(y if residual is None else y + residual, activation)


def pack(weight: Tensor) -> Mapping[str, Tensor]:
    """A 2:4 `weight` [out, in] as cuSPARSELt has it, ``packed``, and ``dense`` uint8 [0, out, in], its shape.

    Raises:
        PatternError: more than two nonzeros in four aligned inputs.
    """
    nm.check(weight, 2, 4)
    packed = _quietly(to_sparse_semi_structured, weight.contiguous()).packed
    assert packed is not None
    return {"packed": packed, "dense": torch.empty(0, *weight.shape, dtype=torch.uint8, device=weight.device)}


def _sparse(packed: Tensor, dense: Tensor) -> Tensor:
    """The weight [out, in]."""
    return _quietly(SparseSemiStructuredTensorCUSPARSELT, dense.shape[1:], packed, None, None, None, None)


def _quietly(make, *args):
    """What `make` returns, without PyTorch's warning that this part of it is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The PyTorch API of SparseSemiStructuredTensor is in prototype"
        )
        return make(*args)


def _cast(tensor: Tensor | None, packed: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(packed.dtype)


def _run(
    x,
    bias,
    packed,
    dense,
    activation: str = "none",
    residual: Tensor | None = None,
    in_features: int | None = None,
) -> Tensor:
    return semi_structured_linear(x, packed, dense, bias, activation, residual)


def _reference(
    x,
    bias,
    packed,
    dense,
    activation: str = "none",
    residual: Tensor | None = None,
    in_features: int | None = None,
) -> Tensor:
    """By the dense weight, which only a GPU can read out of what `pack` made."""
    y = F.linear(x, _sparse(packed, dense).to_dense(), bias)
    return activate(y if residual is None else y + residual, ACTIVATIONS[activation_code(activation)])


def _refuses(problem: Problem) -> list[str]:
    rows, columns = problem.shape
    tests = {
        f"it runs on cuda, not {problem.device.type}": problem.device.type != "cuda",
        f"cuSPARSELt has bfloat16 and float16, not {str(problem.dtype)[6:]}": problem.dtype not in DTYPES,
        "its input gradient would need the transposed weight, which is not 2:4": problem.training,
        "the zeros are not known to be 2:4": problem.group is None or problem.group[0] > 2,
        f"cuSPARSELt takes multiples of {MULTIPLE}, not {rows} x {columns}": bool(
            rows % MULTIPLE or columns % MULTIPLE
        ),
        "this PyTorch has no cuSPARSELt": not torch.backends.cusparselt.is_available(),
    }
    reasons = [reason for reason, applies in tests.items() if applies]
    if (
        not reasons
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(problem.device) < (8, 0)
    ):
        reasons.append("tensor cores are sparse from compute capability 8.0 on")
    return reasons


def _cost(problem: Problem) -> Cost:
    stored = torch.Size(problem.shape).numel() // 2
    return Cost(2 * problem.batch * problem.nnz, stored * problem.dtype.itemsize + stored // 4)


SEMI_STRUCTURED = register(
    Kernel("cuda-24", "linear", "semi-structured", pack, _run, _reference, _refuses, _cost)
)
