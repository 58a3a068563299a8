"""A method of its own for the backward of linear ops: the input gradient by a second mask, noise on dW."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.method import Extra, Method
from fxsparse.reparam import ValueMap, one_node, with_gradient
from fxsparse.rng import uniform_at
from fxsparse.rules import LargestMagnitude
from fxsparse.schedule import Schedule
from fxsparse.scores import magnitude


@one_node
def masked(weight, mask, other):
    del other
    return with_gradient(torch.where(mask, weight.detach(), 0), (weight, None))


@one_node
def noisy_linear(x, effective, bias, mask, other, step, key):
    return _NoisyLinear.apply(x, effective, bias, other, step, key)


class _NoisyLinear(torch.autograd.Function):
    """dX by the weight under `other`; dW of the output gradient with half of its rows, twice as large, at random."""

    @staticmethod
    def forward(ctx: Any, x, effective, bias, other, step, key):
        ctx.save_for_backward(x, effective, other, step.clone())
        ctx.key = key
        return F.linear(x, effective, bias)

    @staticmethod
    def backward(ctx: Any, *grads):
        x, effective, other, step = ctx.saved_tensors
        kept = 2.0 * (uniform_at(step, ctx.key, grads[0].shape[:1]) < 0.5)
        thinned = grads[0] * kept[:, None]
        return grads[0] @ (effective * other), thinned.t() @ x, grads[0].sum(0), None, None, None


def first_column(weight, mask, generator):
    del mask, generator
    mark = torch.zeros_like(weight, dtype=torch.bool)
    mark[:, 0] = True
    return mark


NOISY = Method(
    "noisy",
    ValueMap(masked, extras=(Extra("other", first_column),), linear=noisy_linear),
    magnitude,
    "a test",
    rule=LargestMagnitude(),
    schedule=Schedule(1, start=1),
)
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def build(model=None):
    torch.manual_seed(0)
    model = nn.Linear(6, 3) if model is None else model
    return fxsparse.compile(model, Plan(sparsity=0.5, method=NOISY, allocation="uniform"), example_inputs=X)


def gradient(sparse, x=X):
    x = x.clone().requires_grad_()
    sparse.zero_grad()
    sparse(x).square().sum().backward()
    return sparse.get_parameter("weight").grad.clone(), x.grad


def test_the_forward_is_unchanged_and_the_input_gradient_goes_by_the_other_mask():
    sparse = build()
    weight = sparse.dense_state_dict()["weight"]
    expected = F.linear(X, weight, sparse.get_parameter("bias"))
    torch.testing.assert_close(sparse(X), expected)
    _, into = gradient(sparse)
    assert not into[:, 1:].any()
    torch.testing.assert_close(into[:, 0], (2 * expected @ weight)[:, 0].detach())
    [row] = [row for row in sparse.report.passes if row["name"] == "insert-linear-rule"]
    assert row["rewrites"] == 1


def test_random_numbers_are_those_of_the_step_and_unbiased():
    sparse = build()
    exact = 2 * (sparse(X).detach().t() @ X)
    draws = []
    for step in range(400):
        sparse.get_buffer("fxsparse_step").fill_(step)
        draws.append(gradient(sparse)[0])
    assert torch.equal(draws[-1], gradient(sparse)[0])
    assert not torch.equal(draws[-1], draws[-2])
    spread = torch.stack(draws).std(0) / 20
    assert ((torch.stack(draws).mean(0) - exact).abs() < 4.5 * spread).all()


def test_checkpointing_copies_a_resumed_run_and_a_compiled_one_draw_the_same():
    sparse = build()
    plain = gradient(sparse)[0]
    sparse.zero_grad()
    checkpoint(sparse, X, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(sparse.get_parameter("weight").grad, plain)
    assert torch.equal(gradient(copy.deepcopy(sparse))[0], plain)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(sparse, backend=counter, fullgraph=True)
    sparse.zero_grad()
    call(X).square().sum().backward()
    torch.testing.assert_close(sparse.get_parameter("weight").grad, plain)
    assert counter.frame_count == 1


def test_inference_has_the_plain_op_again():
    sparse = build().eval()
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=X)
    torch.testing.assert_close(fast(X), sparse(X).detach())
    assert not [key for key in fast.state_dict() if "mask" in key or "other" in key or "fxsparse" in key]


def test_a_convolution_keeps_its_backward_with_a_note_and_a_module_walk_is_refused():
    sparse = fxsparse.compile(
        nn.Conv1d(4, 4, 1), Plan(sparsity=0.5, method=NOISY), example_inputs=torch.randn(2, 4, 5)
    )
    [row] = [row for row in sparse.report.passes if row["name"] == "insert-linear-rule"]
    assert row["notes"] == ["weight: conv1d keeps the usual backward"]

    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)

    with pytest.raises(PlanError, match="noisy changes the backward of linear ops, which takes a graph"):
        build(Untraceable())
