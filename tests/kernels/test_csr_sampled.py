"""The weight gradient at some entries: against the dense product, on both implementations, without a dense tensor."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse.kernel import tolerance
from fxsparse.kernels import gradient_at
from fxsparse.testing import assert_close, forbid_tensors_of

SHAPE = (37, 53)


def pairs(dtype, tokens=(5, 70)):
    return [(torch.randn(n, SHAPE[1]).to(dtype), torch.randn(n, SHAPE[0]).to(dtype)) for n in tokens]


def positions(count):
    return torch.randperm(SHAPE[0] * SHAPE[1])[:count].sort().values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 200, SHAPE[0] * SHAPE[1]])
def test_equals_the_dense_gradient_summed_over_backwards(dtype, count):
    seen, at = pairs(dtype), positions(count)
    sampled = gradient_at(seen, at, SHAPE)
    dense = sum(grad.double().t() @ x.double() for x, grad in seen)
    scale = sum(grad.double().abs().t() @ x.double().abs() for x, grad in seen).max().item()
    assert sampled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(sampled, dense.flatten()[at], tolerance(sampled.dtype, 75), scale)


def test_leading_dimensions_are_tokens():
    ((x, grad),) = pairs(torch.float32, (6,))
    at = positions(40)
    torch.testing.assert_close(
        gradient_at([(x.view(2, 3, -1), grad.view(2, 3, -1))], at, SHAPE), gradient_at([(x, grad)], at, SHAPE)
    )


def test_makes_no_tensor_of_the_weights_size():
    seen, at = pairs(torch.float32, (4,)), positions(100)
    with forbid_tensors_of(SHAPE[0] * SHAPE[1]):
        gradient_at(seen, at, SHAPE)


def test_the_op_keeps_its_contract_and_counts_its_flops():
    ((x, grad),) = pairs(torch.float32, (6,))
    crow = torch.zeros(SHAPE[0] + 1, dtype=torch.int32)
    crow[5:] = 3
    cols = torch.tensor([0, 7, 52], dtype=torch.int32)
    opcheck(torch.ops.fxsparse.csr_sample.default, (grad, x, crow, cols))
    with FlopCounterMode(display=False) as counter:
        torch.ops.fxsparse.csr_sample(grad, x, crow, cols)
    assert counter.get_total_flops() == 2 * 3 * 6


def test_refuses_pairs_that_do_not_fit():
    ((x, grad),) = pairs(torch.float32, (6,))
    with pytest.raises((RuntimeError, IndexError)):
        gradient_at([(x[:, :20], grad)], torch.tensor([52]), SHAPE)
