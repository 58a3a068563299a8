import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.flops.training import train_flops
from fxsparse.method import Held
from fxsparse.methods import top_kast
from fxsparse.methods.top_kast import Exploration

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def build(optimizer="sgd", sparsity=0.8, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    sparse = fxsparse.compile(model, Plan(sparsity=sparsity, method=top_kast(**options)))
    made = OPTIMIZERS[optimizer](sparse.parameters())
    sparse.attach(made)
    return sparse, made


def step(sparse, optimizer, at):
    optimizer.zero_grad()
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at))
    (sparse(x) - 1).square().mean().backward()
    optimizer.step()


def test_the_penalty_pulls_the_exploring_set_harder():
    weight = torch.tensor([4.0, 2, 1, 0.5])
    mask, backward = torch.tensor([True, False, False, False]), torch.tensor([True, True, False, False])
    found = Exploration(0.1)([Held("w", weight, mask, {"backward": backward})], step=0)
    torch.testing.assert_close(1 + found[0]["weight"][:2], torch.tensor([1.4, 1.8]))
    assert not found[0]["weight"][2:].any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_is_within_b_and_nothing_outside_of_b_moves(optimizer):
    sparse, made = build(optimizer, every=3)
    for at in range(13):
        masks = sparse.masks()
        backward = {name: sparse.get_buffer(f"{name}_backward").clone() for name in masks}
        before = {name: sparse.get_parameter(name).detach().clone() for name in masks}
        step(sparse, made, at)
        for name, mask in masks.items():
            weight = sparse.get_parameter(name)
            assert not (mask & ~backward[name]).any()
            assert int(backward[name].sum()) == 2 * int(mask.sum())
            assert not weight.grad[~backward[name]].any()
            assert torch.equal(weight.detach()[~backward[name]], before[name][~backward[name]])
            assert not torch.equal(weight.detach(), before[name])
    assert sparse.penalty_norm > 0


def test_with_everything_in_b_and_no_penalty_it_is_straight_through():
    sparse, made = build(every=2, backward=1e9, penalty=0)
    assert sparse.get_buffer("0.weight_backward").all()
    step(sparse, made, 0)
    assert sparse.get_parameter("0.weight").grad[~sparse.masks()["0.weight"]].any()
    assert sparse.penalty_norm is None


def test_with_b_equal_to_a_and_no_penalty_it_is_static():
    sparse, made = build(every=50, backward=1, penalty=0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    fixed = fxsparse.compile(model, Plan(sparsity=0.8, method=fxsparse.methods.static("magnitude")))
    other = OPTIMIZERS["sgd"](fixed.parameters())
    fixed.attach(other)
    for at in range(5):
        step(sparse, made, at)
        step(fixed, other, at)
    for name, weight in sparse.dense_state_dict().items():
        torch.testing.assert_close(weight, fixed.dense_state_dict()[name])


@pytest.mark.parametrize(("density", "wider", "expected"), [(0.1, 2.0, 0.13333), (0.2, 2.5, 0.3)])
def test_training_flops_are_forward_forward_and_b(density, wider, expected):
    counts, numels = {"w": 1000 * density}, {"w": 1000}
    found = train_flops(top_kast(backward=wider), lambda c: c["w"], counts, numels)
    assert found / 3000 == pytest.approx(expected, abs=1e-5)
    model = nn.Linear(100, 10)
    plan = Plan(sparsity=1 - density, method=top_kast(backward=wider), allocation="uniform")
    assert fxsparse.count_flops(model, torch.randn(1, 100), plan).train_ratio == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("option", [{"backward": 0.5}, {"penalty": -1}, {"backward": float("nan")}])
def test_a_bad_option_is_named(option):
    with pytest.raises(PlanError, match=f"expected {next(iter(option))} as a number >="):
        top_kast(**option)
