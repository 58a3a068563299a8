import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.flops.training import train_flops
from fxsparse.methods import feather
from fxsparse.methods.feather import feather_map, quantile
from fxsparse.topk import top_mask

WEIGHT = torch.tensor([-2.0, -0.5, 0.3, 1.5], dtype=torch.float64)


def mapped(weight, threshold, power=3.0, theta=1.0):
    return feather_map(
        weight, weight.detach().abs() > threshold, torch.tensor(threshold).double(), power, theta
    )


def test_values_worked_out_beforehand():
    expected = torch.tensor([-1.989529, 0, 0, 1.481248], dtype=torch.float64)
    torch.testing.assert_close(mapped(WEIGHT, 0.5), expected, atol=1e-6, rtol=0)
    at = torch.tensor([1.1, 1.5, 2, 4], dtype=torch.float64)
    expected = torch.tensor([0.69174, 1.3342, 1.91293, 3.97906], dtype=torch.float64)
    torch.testing.assert_close(mapped(at, 1.0), expected, atol=5e-6, rtol=0)


def test_power_one_is_the_soft_threshold_and_a_large_one_the_hard_one():
    torch.testing.assert_close(mapped(WEIGHT, 0.4, 1.0), WEIGHT.sign() * (WEIGHT.abs() - 0.4).relu())
    torch.testing.assert_close(mapped(WEIGHT, 0.4, 60.0), WEIGHT * (WEIGHT.abs() > 0.4), atol=1e-3, rtol=0)


def test_the_threshold_is_the_interpolated_quantile():
    kept = top_mask(WEIGHT.abs(), 2)
    assert float(quantile(WEIGHT.abs(), kept, 2)) == 1.0
    sizes = torch.rand(57, dtype=torch.float64)
    for total in (1, 20, 56, 57):
        found = float(quantile(sizes, top_mask(sizes, total), total))
        expected = 0.0 if total == 57 else float(torch.quantile(sizes, 1 - total / 57))
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_what_is_cut_gets_its_share_of_the_gradient(theta):
    weight = WEIGHT.clone().requires_grad_()
    upstream = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    mapped(weight, 0.5, theta=theta).backward(upstream)
    assert weight.grad.tolist() == [1.0, 2 * theta, 3 * theta, 4.0]


def test_the_schedule_and_the_average_density_are_the_papers():
    method = feather(steps=1000)
    density = [method.nnz(step, 100, 1000) / 1000 for step in (0, 125, 250, 500)]
    assert density == pytest.approx([1, 1 - 0.520312, 1 - 0.7875, 0.1], abs=6e-4)
    forward = train_flops(method, lambda counts: counts["w"], {"w": 100}, {"w": 1000})
    assert forward == pytest.approx(2 * 212.5 + 1000, rel=2e-3)


def test_folding_stores_the_shrunk_values_and_the_threshold_is_one_of_all_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=feather(steps=20)))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        (sparse(torch.randn(12, 16)) - 1).square().mean().backward()
        optimizer.step()
    sizes = torch.cat([sparse.get_parameter(f"{i}.weight").detach().abs().flatten() for i in (0, 2)])
    threshold = sparse.get_buffer("0.weight_threshold")
    assert torch.equal(threshold, sparse.get_buffer("2.weight_threshold"))
    # 115 of 576 stay at the end
    assert float(threshold) == pytest.approx(float(torch.quantile(sizes, 1 - 115 / 576)), rel=1e-5)
    folded = sparse.to_dense().get_parameter("0.weight").detach()
    plain = sparse.get_parameter("0.weight").detach() * sparse.masks()["0.weight"]
    assert (folded.abs() <= plain.abs()).all()
    assert (plain - folded).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps as an integer >= 1, got 0"),
        ({"start": "0"}, "start as an integer >= 0"),
        ({"steps": 10, "start": 15}, "start below the 10 steps, got 15"),
    ],
)
def test_steps_in_which_nothing_would_be_pruned_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        feather(**options)


@pytest.mark.parametrize("option", [{"theta": 2}, {"power": 0.5}, {"ramp": 1.5}])
def test_a_bad_option_is_named(option):
    with pytest.raises(PlanError, match=f"expected {next(iter(option))} as a number from"):
        feather(**option)
