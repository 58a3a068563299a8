from dataclasses import replace

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.flops.training import train_flops
from fxsparse.methods import snfs
from fxsparse.methods.snfs import SparseMomentum, importances
from fxsparse.pattern import Unstructured
from fxsparse.testing import view_of


def views(rate, *pairs):
    method, made = snfs(every=1, stop=100, drop_fraction=rate, final_drop_fraction=rate), []
    for name, (weight, momentum) in zip("abc", pairs, strict=False):
        view = view_of(method, Unstructured(), weight, weight != 0, momentum, 0, 1)
        made.append(replace(view, name=name))
    return made


def chosen(given):
    total = sum(len(view.active) for view in given)
    found = SparseMomentum().choose_all(given, total)
    assert sum(map(len, found)) == total
    return found


def test_the_share_that_is_dropped_falls_along_a_cosine_from_a_half():
    curve = snfs(every=1, stop=100).schedule.drop_fraction
    expected = [0.5, 0.427509, 0.2525, 0.077491, 0.005]
    assert [curve(step) for step in (0, 25, 50, 75, 100)] == pytest.approx(expected, abs=5e-7)


def test_importance_is_the_mean_of_active_momentum_and_sums_to_1():
    found = importances([torch.tensor([1.0, 3.0]), torch.tensor([6.0]), torch.tensor([])])
    assert found == [0.25, 0.75, 0.0]
    assert importances([torch.zeros(2), torch.zeros(1)]) == [0.5, 0.5]


def test_what_is_dropped_everywhere_is_grown_by_importance():
    """Both drop 2 of 4 by magnitude.  Active momenta are 3 and 1 on average, so of the 4, a gets 3 and b 1."""
    a = torch.tensor([[1.0, 9, 2, 8, 0, 0, 0, 0, 0, 0]]), torch.tensor([[0.0, 6, 0, -6, 1, -5, 2, 4, 0, 0]])
    b = torch.tensor([[9.0, 1, 8, 2, 0, 0, 0, 0, 0, 0]]), torch.tensor([[1.0, 1, 1, -1, 0, 0, -3, 2, 0, 0]])
    found = chosen(views(0.5, a, b))
    assert found[0].tolist() == [1, 3, 5, 6, 7]
    assert found[1].tolist() == [0, 2, 6]


def test_full_weights_pass_on_what_they_cannot_take():
    """a has 4 free places after it dropped 2 of 6, and may fill 3 of them (99 %); b takes the rest."""
    a = torch.cat([torch.arange(1.0, 7), torch.zeros(2)])[None], torch.full((1, 8), 100.0)
    b = torch.cat([torch.arange(1.0, 9), torch.zeros(12)])[None], torch.full((1, 20), 1.0)
    found = chosen(views(1 / 3, a, b))
    assert [len(f) for f in found] == [4 + 3, 5 + 2]
    whole = chosen(views(0.5, (torch.ones(1, 4), torch.ones(1, 4))))
    assert len(whole[0]) == 4


def test_an_important_weight_that_is_nearly_dense_drops_no_more_than_its_sparsity():
    """9 of 10 active: ceil(0.1 x 9) = 1 goes and not 5, for it is more important than the mean."""
    dense = torch.cat([torch.arange(1.0, 10), torch.zeros(1)])[None]
    sparse = torch.cat([torch.arange(1.0, 5), torch.zeros(16)])[None]
    high, low = torch.full((1, 10), 5.0), torch.full((1, 20), 1.0)
    found = chosen(views(0.5, (dense, high), (sparse, low)))
    assert [len(f) for f in found] == [9, 4]
    found = chosen(views(0.5, (dense, low[:, :10]), (sparse, 5 * low)))
    assert [len(f) for f in found] == [4 + 1, 2 + 6]


def test_one_weight_alone_keeps_the_smaller_momentum_out():
    weight, momentum = torch.tensor([[4.0, -3, 1, 2, 0, 0]]), torch.tensor([[0.0, 0, 7, 0, 9, -8]])
    assert chosen(views(0.5, (weight, momentum)))[0].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_total_stays_counts_drift_and_the_average_is_of_dense_gradients(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    plan = Plan(sparsity=0.8, method=snfs(every=2, stop=20))
    assert plan.allocation == "uniform"
    sparse = fxsparse.compile(model, plan)
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    }[optimizer](sparse.parameters())
    sparse.attach(made)
    start = {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    for at in range(12):
        made.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at))
        (sparse(x) - 1).square().mean().backward()
        made.step()
        for name, mask in sparse.masks().items():
            weight = sparse.get_parameter(name)
            state = made.state[weight]["momentum_buffer" if optimizer == "sgd" else "exp_avg"]
            assert not weight.detach()[~mask].any()
            assert state[~mask].any()
    counts = {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    assert sum(counts.values()) == sum(start.values())
    assert counts != start


def test_every_step_costs_a_dense_weight_gradient():
    found = train_flops(snfs(), lambda counts: 10 * counts["w"], {"w": 20}, {"w": 100})
    assert found == 2 * 200 + 1000


def test_a_bad_option_is_named():
    with pytest.raises(PlanError, match="drop fraction as a number from 0 to 1"):
        snfs(drop_fraction=1.5)
    with pytest.raises(PlanError, match="stop as an integer >= 1, got 0"):
        snfs(stop=0)
