import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.passes import ChooseLayers, CollectWeights, Functionalize, InferShapes
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture
from fxsparse.transforms import SparseDoped, SparseFactorized, SparseParallel, SparseWide


def chosen(model, x, transform=None, **plan):
    plan = Plan(transform=transform or SparseWide(), sparsity=0.5, **plan)
    ctx = PassContext(plan, "train", capture(model, x), Report(), x)
    run_passes((Functionalize(), InferShapes(), CollectWeights(), ChooseLayers()), ctx)
    assert ctx.report.passes[-1]["rewrites"] == 0
    return ctx.transformed


def test_the_ends_stay_dense():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    found = chosen(model, torch.randn(2, 4))
    assert found.layers == ["2.weight", "3.weight"]
    assert found.dense == {
        "0.weight": "Sparse-IFT leaves it dense: it reads the model's input",
        "4.weight": "Sparse-IFT leaves it dense: it makes the model's output",
    }


def test_layers_after_an_embedding_read_no_input():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert chosen(model, torch.zeros(2, 3, dtype=torch.long)).layers == ["1.weight"]


def test_grouped_depthwise_and_transposed_convolutions_stay_dense_with_their_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 2, 1),
    )
    found = chosen(model, torch.randn(2, 3, 8, 8))
    assert found.layers == ["4.weight"]
    reasons = {name: why.removeprefix("Sparse-IFT leaves it dense: ") for name, why in found.dense.items()}
    assert reasons["1.weight"] == "depthwise convolution"
    assert reasons["2.weight"] == "grouped convolution"
    assert reasons["3.weight"] == "transposed convolution"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.last(self.b(torch.relu(self.a(self.first(x)))))


@pytest.mark.parametrize(("transform", "layers"), [(SparseWide(), ["a.weight"]), (SparseDoped(), [])])
def test_a_tied_weight_is_widened_but_not_replaced(transform, layers):
    found = chosen(Tied(), torch.randn(2, 4), transform)
    assert found.layers == layers
    if not layers:
        assert found.dense["a.weight"] == "Sparse-IFT leaves it dense: tied to 'b.weight'"


def test_what_the_plan_excludes_is_not_looked_at():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    assert chosen(model, torch.randn(2, 4), exclude=("1",)).layers == ["2.weight"]


class OwnBias(nn.Module):
    """Like the attention of Swin V2, whose keys have no bias; and a penalty in the forward."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.c, self.last = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        bias = self.a.bias.clone()
        bias[1:2].zero_()
        y = nn.functional.linear(self.first(x), self.a.weight, bias)
        return self.last(self.c(self.b(y))) + self.b.weight.abs().sum()


def test_layers_whose_parts_are_read_otherwise_are_not_replaced_but_widened():
    model, x = OwnBias(), torch.randn(2, 4)
    found = chosen(model, x, SparseDoped())
    assert found.layers == ["c.weight"]
    reasons = {name: why.removeprefix("Sparse-IFT leaves it dense: ") for name, why in found.dense.items()}
    assert reasons["a.weight"] == "the graph computes its bias"
    assert reasons["b.weight"] == "something other than its calls reads it"
    assert {"a.weight", "c.weight"} <= set(chosen(model, x, SparseWide()).layers)
    made = fxsparse.compile(model, Plan(transform=SparseDoped(), sparsity=0.5), example_inputs=x)
    made(x).sum().backward()
    assert made.get_parameter("a.bias").grad is not None


def linear(x, layer, bias):
    return nn.functional.linear(x, layer.weight, bias)


READ_OTHERWISE = {
    "its calls add different biases": [
        lambda m, y: linear(y, m.b, m.b.bias) + linear(2 * y, m.b, None),
        lambda m, y: linear(y, m.b, None) + linear(2 * y, m.b, m.b.bias),
        lambda m, y: linear(y, m.b, m.b.bias) + linear(2 * y, m.b, m.first.bias),
        lambda m, y: linear(y, m.b, m.b.bias if m.training else None),
    ],
    "something other than its calls reads its bias": [lambda m, y: m.b(y) + m.b.bias.abs().sum()],
}


class Reading(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.b, self.c, self.last = (nn.Linear(4, 4) for _ in range(4))
        self.middle = middle

    def forward(self, x):
        return self.last(self.c(self.middle(self, self.first(x))))


@pytest.mark.parametrize(("reason", "middle"), [(why, m) for why, ms in READ_OTHERWISE.items() for m in ms])
def test_layers_whose_calls_differ_are_not_replaced(reason, middle):
    model, x = Reading(middle), torch.randn(2, 4)
    found = chosen(model, x, SparseDoped())
    assert found.dense["b.weight"] == f"Sparse-IFT leaves it dense: {reason}"
    assert found.layers == ["c.weight"]
    for transform in (SparseDoped(), SparseFactorized(), SparseParallel()):
        made = fxsparse.compile(model, Plan(transform=transform, sparsity=0.5), example_inputs=x)
        made(x).sum().backward()
        assert torch.equal(made.get_parameter("b.weight"), model.b.weight)


class TwoWindows(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        other = nn.functional.conv2d(y, self.b.weight, self.b.bias, padding=2, dilation=2)
        return self.d(self.c(self.b(y) + other))


def test_a_convolution_with_two_windows_is_not_replaced():
    found = chosen(TwoWindows(), torch.randn(2, 3, 8, 8), SparseDoped())
    assert found.layers == ["c.weight"]
    assert found.dense["b.weight"].endswith("its calls read it in different ways")


def test_layers_that_share_a_bias_are_not_replaced():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    model[2].bias = model[1].bias
    found = chosen(model, torch.randn(2, 4), SparseParallel())
    assert found.layers == ["3.weight"]
    assert found.dense["1.weight"].endswith("its bias is tied to '2.bias'")


def test_a_scaled_sum_of_a_weight_is_no_channel():
    model, x = (
        Reading(lambda m, y: y @ m.b.weight.t() + m.b.bias + m.b.weight.t().abs().sum() * 0.01),
        torch.randn(2, 4),
    )
    made = fxsparse.compile(model, Plan(transform=SparseWide(), sparsity=0.75), example_inputs=x)
    assert made(x).shape == (2, 4)
    assert made.get_parameter("b.weight").shape == (8, 8)
