import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import NumericsError, PlanError
from fxsparse.methods import str_
from fxsparse.methods.str_ import str_map

WEIGHT = torch.tensor([-2.0, -0.5, 0.3, 1.5], dtype=torch.float64)


def test_values_and_the_gradient_of_the_threshold_worked_out_beforehand():
    s = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    found = str_map(WEIGHT, WEIGHT != 0, s)
    expected = torch.tensor([-1.731059, -0.231059, 0.031059, 1.231059], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=0)
    upstream = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    found.backward(upstream)
    slope = torch.sigmoid(s.detach()) * torch.sigmoid(-s.detach())
    assert s.grad.item() == pytest.approx(-float(slope * (upstream * WEIGHT.sign()).sum()))


def build(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    return fxsparse.compile(model, Plan(sparsity=0.9, method=str_(**options)))


def test_the_threshold_rises_by_weight_decay_and_decides_the_count():
    sparse = build(initial=-6.0, weight_decay=0.5)
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.1, weight_decay=1e-4))
    sparse.attach(optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-4, 0.5]
    counts = []
    for _ in range(40):
        optimizer.zero_grad()
        sparse(torch.randn(12, 16)).square().mean().backward()
        optimizer.step()
        counts.append(sum(int(mask.sum()) for mask in sparse.masks().values()))
    assert counts[-1] < counts[0] < 576
    assert float(sparse.get_parameter("0.weight_threshold").detach()) > -6
    for name in ("0.weight", "2.weight"):
        assert torch.equal(sparse.dense_state_dict()[name] != 0, sparse.masks()[name])


def test_an_optimizer_that_decays_thresholds_as_weights_is_warned_of_and_one_without_them_refused():
    sparse = build(initial=-6.0)
    with pytest.warns(UserWarning, match="has weight_decay=0.01 for '0.weight_threshold', expected 2.25"):
        sparse.attach(torch.optim.AdamW(sparse.parameters()))
    named = dict(sparse.named_parameters())
    without = [p for name, p in named.items() if not name.endswith("threshold")]
    with pytest.raises(PlanError, match=r"does not hold '0.weight_threshold', which str learns"):
        sparse.attach(torch.optim.SGD(without, lr=0.1))


def test_an_optimizer_from_before_gets_the_thresholds_in_a_group_of_their_own():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = fxsparse.compile(model, Plan(sparsity=0.9, method=str_(initial=-6.0)), optimizer=optimizer)
    assert optimizer.param_groups[1]["params"] == [sparse.get_parameter("weight_threshold")]
    assert optimizer.param_groups[1]["weight_decay"] == 2.251757813e-5
    assert list(model.state_dict()) == ["weight", "bias"]


def test_weights_that_have_diverged_are_named_and_not_taken_for_zeros():
    sparse = build(initial=-6.0)
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.1))
    sparse.attach(optimizer)
    with torch.no_grad():
        sparse.get_parameter("0.weight")[0, 0] = torch.nan
    sparse(torch.randn(4, 16)).sum().backward()
    with pytest.raises(NumericsError, match="NaN"):
        optimizer.step()


@pytest.mark.parametrize("option", [{"initial": float("inf")}, {"weight_decay": -1.0}])
def test_a_bad_option_is_named(option):
    with pytest.raises(PlanError, match=f"expected {next(iter(option))} as a finite number"):
        str_(**option)
