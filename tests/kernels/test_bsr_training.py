from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fxsparse import testing
from fxsparse.formats import bsr
from fxsparse.kernel import Problem, registered
from fxsparse.kernels import trainable_bsr_linear


def packed_weight(block=16, dtype=torch.float32, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(4, 3, generator=generator) < density).repeat_interleave(block, 0)
    mask = kept.repeat_interleave(block, 1)
    weight = (torch.randn(mask.shape, generator=generator) * mask).to(dtype)
    return weight, bsr.pack_for_training(weight)


@pytest.mark.parametrize("name", ["cuda-bsr", "cuda-bsr-train"])
def test_what_runs_without_a_gpu_fulfils_the_contract(name):
    entry = registered()[name]

    def refuses(problem):
        return entry.refuses(replace(problem, device=torch.device("cuda")))

    assert testing.check_kernel(replace(entry, refuses=refuses)) > 20


def test_gradients_are_exact_in_double_precision():
    _, packed = packed_weight(dtype=torch.float64)
    values = packed.pop("values").requires_grad_()
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, v, b: trainable_bsr_linear(x, v, **packed, bias=b), (x, values, bias), fast_mode=True
    )


def test_only_what_needs_a_gradient_gets_one():
    weight, packed = packed_weight()
    values = packed.pop("values")
    x, bias = torch.randn(2, 5, 48, requires_grad=True), torch.randn(64)
    trainable_bsr_linear(x, values, **packed, bias=bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 5, -1))
    values.requires_grad_()
    trainable_bsr_linear(x.detach(), values, **packed).sum().backward()
    assert values.grad is not None
    exact = x.detach().sum((0, 1)).expand(64, -1) * (weight != 0)
    index = [packed[name] for name in ("crow", "columns", "dense")]
    torch.testing.assert_close(bsr.to_dense(values.grad, *index), exact)


def test_ops_pass_opcheck_and_count_flops():
    _, packed = packed_weight()
    x, grad = torch.randn(2, 5, 48), torch.randn(2, 5, 64)
    forward = [packed[name] for name in ("values", "crow", "columns", "dense")]
    index = [packed[name] for name in ("ccol", "rows_t", "perm", "order_t")]
    with FlopCounterMode(display=False) as counter:
        opcheck(
            torch.ops.fxsparse.bsr_product.default,
            (x, *forward, torch.randn(64), 2, None, packed["order"]),
            test_utils=("test_schema",),
        )
    one = 2 * 10 * packed["values"].numel()
    assert counter.get_total_flops() % one == 0
    for needed in ((True, True, True), (False, True, False)):
        given = (grad, x, *forward, *index, *needed)
        opcheck(torch.ops.fxsparse.bsr_backward.default, given)
        with FlopCounterMode(display=False) as counter:
            torch.ops.fxsparse.bsr_backward(*given)
        assert counter.get_total_flops() == sum(needed[:2]) * one


def test_joined_weights_train_as_they_do_alone():
    weights = [packed_weight(seed=seed)[0] for seed in (0, 1)]
    parts = [bsr.pack_for_inference(weight) for weight in weights]
    values = [part["values"].requires_grad_() for part in parts]
    joined = bsr.joined(parts)
    x = torch.randn(5, 48)
    y = trainable_bsr_linear(x, **joined, **bsr.by_column(joined))
    torch.testing.assert_close(y, F.linear(x, torch.cat(weights)))
    upstream = torch.randn(5, 128)
    for part, one, grad in zip(
        parts, torch.autograd.grad(y, values, upstream), upstream.split(64, 1), strict=True
    ):
        alone = bsr.to_dense(one, part["crow"], part["columns"], part["dense"])
        exact = (grad.T @ x) * bsr.to_dense(
            torch.ones_like(one), part["crow"], part["columns"], part["dense"]
        )
        torch.testing.assert_close(alone, exact)


def test_autocast_trains_single_precision_values():
    weight, packed = packed_weight()
    values = packed.pop("values").requires_grad_()
    x = torch.randn(7, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = trainable_bsr_linear(x, values, **packed)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.linear(x, weight), rtol=2e-2, atol=1e-1)
    y.float().sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.float32


def test_blocks_by_column_are_those_by_row():
    weight, packed = packed_weight(density=0.6)
    by_column = weight.T.contiguous()
    turned = bsr.pack(by_column, [(16, 16)], paired=False)
    assert torch.equal(packed["ccol"], turned["crow"])
    assert torch.equal(packed["rows_t"], turned["columns"])
    assert torch.equal(packed["values"][packed["perm"].long()].transpose(1, 2), turned["values"])
    lengths = packed["ccol"].diff()[packed["order_t"].long()].tolist()
    assert lengths == sorted(lengths, reverse=True)


def test_it_is_for_training_in_blocks_on_a_gpu():
    refuses = registered()["cuda-bsr-train"].refuses
    problem = Problem(
        "linear", (64, 64), 4, 512, torch.bfloat16, torch.device("cuda"), training=True, is_blocked=True
    )
    assert refuses(problem) == []
    assert refuses(replace(problem, training=False, is_blocked=False, device=torch.device("cpu"))) == [
        "it runs on cuda, not cpu",
        "it is for training: cuda-bsr needs less memory",
        "zeros do not lie in blocks",
    ]
