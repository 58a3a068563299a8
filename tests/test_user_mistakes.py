"""What users try that fits no model of theirs: each gets a result that is right, or a word that says why not."""

import random
from collections import UserDict

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import TraceError
from fxsparse.methods import static, wanda

PLAN = Plan(sparsity=0.5, method=static("magnitude"), storage="masked")


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * self.calls


class Drawing(Counting):
    def forward(self, x):
        return self.layer(x) * random.random()


class Choosing(Counting):
    def forward(self, x, twice=False):
        return self.layer(self.layer(x)) if twice else self.layer(x)


def test_a_forward_that_counts_its_calls_goes_on_counting():
    model, x = Counting(), torch.randn(2, 8)
    sparse = fxsparse.compile(model, PLAN, example_inputs=(x,))
    assert "It writes calls." in " ".join(sparse.report.notes)
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=(x,))
    for module in (sparse.eval(), fast):
        first, second = module(x), module(x)
        calls = round((first / (second - first)).mean().item())
        torch.testing.assert_close(second, first * (calls + 1) / calls)
    assert model.calls == 0


def test_a_forward_that_draws_by_python_stays_its_own():
    sparse = fxsparse.compile(Drawing(), PLAN, example_inputs=(torch.randn(2, 8),))
    x = torch.randn(2, 8)
    assert not torch.equal(sparse(x), sparse(x))
    with pytest.raises(TraceError, match="a second call with the same inputs differs"):
        fxsparse.compile(Drawing(), PLAN, example_inputs=(x,), strict=True)


@pytest.mark.parametrize("call", [lambda module, x: module(x, twice=True), lambda module, x: module(x, True)])
def test_another_value_of_a_plain_argument_is_refused_by_name(call):
    x = torch.randn(2, 8)
    sparse = fxsparse.compile(Choosing(), PLAN, example_inputs=(x,))
    with pytest.raises(TraceError, match="expected twice=False, as in the example inputs, got another value"):
        call(sparse, x)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_compiling_under_autocast_measures_without_it(mode):
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8)
    with torch.no_grad():
        model[0].weight[3:] = 0
    with torch.autocast("cpu", torch.bfloat16):
        made = fxsparse.compile(model, *([PLAN] if mode == "train" else []), mode=mode, example_inputs=(x,))
    torch.testing.assert_close(made(x), model.eval()(x))


def test_a_plan_that_selects_nothing_warns():
    lstm, x = nn.LSTM(4, 8), torch.randn(3, 2, 4)
    with pytest.warns(UserWarning, match="compile: the plan selected none of the model's 4 parameters"):
        fxsparse.compile(lstm, PLAN, example_inputs=(x,))
    with pytest.warns(UserWarning, match="prune: the plan selected none"):
        fxsparse.prune(lstm, Plan(sparsity=0.5, method=wanda()), calibration=[x])


def test_what_a_tokenizer_returns_is_a_dict_of_inputs():
    model, x = nn.Linear(8, 4), torch.randn(5, 8)
    batch = UserDict(input=x)  # as transformers' BatchEncoding
    pruned = fxsparse.prune(model, Plan(sparsity=0.5, method=wanda()), calibration=[batch])
    expected = fxsparse.prune(model, Plan(sparsity=0.5, method=wanda()), calibration=[x])
    torch.testing.assert_close(pruned.weight, expected.weight, rtol=0, atol=0)
