import torch
from torch import nn

from fxsparse import Budget, Plan
from fxsparse.passes import CollectWeights, Functionalize, InferShapes, PriceWeights
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.prices import Prices
from fxsparse.report import Report
from fxsparse.trace import capture


class Net(nn.Module):
    """A convolution, a linear layer that is called twice, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(self.fc(self.norm(self.conv(x))))


X = torch.randn(5, 2, 8, 8)


def priced(budget: Budget, x=X, **plan) -> Prices:
    ctx = PassContext(Plan(budget=budget, **plan), "train", capture(Net(), x), Report(), x)
    run_passes((Functionalize(), InferShapes(), CollectWeights(), PriceWeights()), ctx)
    assert ctx.prices is not None
    return ctx.prices


def test_flops_count_every_pixel_and_token_of_one_sample():
    prices = priced(Budget(flops=0.5))
    conv, fc = 2 * 36 * 72, 2 * 2 * 24 * 36  # 6 x 6 pixels; twice 4 x 6 tokens
    assert prices.of["conv.weight"](72) == conv
    assert prices.of["fc.weight"](36) == fc
    assert prices.of["fc.weight"](18) == fc / 2
    assert prices.cost({"conv.weight": 72, "fc.weight": 36}) == prices.dense


def test_bytes_never_exceed_those_of_dense_storage():
    prices = priced(Budget(bytes=0.5))
    whole = sum(parameter.nbytes for parameter in Net().parameters())
    assert prices.dense == whole
    assert prices.rest == whole - 4 * (72 + 36)
    assert prices.of["conv.weight"](10) == 4 * 5 + 10 * 6
    assert prices.of["conv.weight"](72) == 4 * 72
    assert [prices.of["conv.weight"](n) for n in range(73)] == [min(4 * 72, 4 * 5 + 6 * n) for n in range(73)]


def test_bytes_of_a_weight_too_small_to_be_worth_storing_sparse_are_those_of_dense():
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 20)

        def forward(self, x):
            return self.fc(x)

    ctx = PassContext(
        Plan(budget=Budget(bytes=0.9)), "train", capture(Narrow(), X[..., :1]), Report(), X[..., :1]
    )
    run_passes((Functionalize(), InferShapes(), CollectWeights(), PriceWeights()), ctx)
    assert ctx.prices is not None
    assert {ctx.prices.of["fc.weight"](n) for n in range(21)} == {80.0}


def test_the_first_glob_decides_and_other_weights_cost_one():
    prices = priced(Budget(total=0.5, cost={"conv": 3.0, "*": 2.0}))
    assert (prices.of["conv.weight"](10), prices.of["fc.weight"](10)) == (30, 20)
    assert priced(Budget(total=0.5, cost={"conv": 3.0})).of["fc.weight"](10) == 10


def test_times_are_measured_on_the_inputs_of_every_call():
    prices = priced(Budget(latency=0.9))
    assert prices.unit == "us"
    assert prices.dense > 0
    for price in prices.of.values():
        costs = [cost for _, cost in price.points]
        assert costs == sorted(costs)
        assert costs[0] > 0


def test_a_sparsity_needs_no_prices():
    ctx = PassContext(Plan(sparsity=0.5), "train", capture(Net(), X), Report(), X)
    run_passes((Functionalize(), InferShapes(), CollectWeights(), PriceWeights()), ctx)
    assert ctx.prices is None
