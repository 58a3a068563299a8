import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.method import Held
from fxsparse.methods import movement, soft_movement
from fxsparse.methods.soft_movement import AboveRising, FewScores
from fxsparse.schedule import Rising


def test_the_threshold_follows_the_papers_cubic():
    """1 - tau / tau_f is the share of the way that movement's v(t) has still to go, from the same warm-ups."""
    tau = Rising(0.1, 100, 800)
    steps = (0, 100, 275, 450, 625, 800, 801, 1000)
    found = [1 - tau(step) / 0.1 for step in steps]
    hard = movement(steps=1000, warmup=100, cooldown=200)
    share = [(hard.nnz(step, 0, 10**6)) / 1e6 for step in steps]
    assert found == pytest.approx(share, abs=1e-6)
    assert found[:4] == pytest.approx([1, 1, 0.421875, 0.125])


def test_the_penalty_is_the_gradient_of_the_mean_over_weights_of_mean_sigmoids():
    tau = Rising(0.1, 0, 10)
    scores = [torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]
    learned = [score.clone().requires_grad_() for score in scores]
    total = 400 * tau(5) / 0.1 * sum(torch.sigmoid(s).mean() for s in learned) / 2
    total.backward()
    held = [Held("w", s, s > 0, {"scores": s}) for s in scores]
    for found, score in zip(FewScores(400.0, tau)(held, 5), learned, strict=True):
        torch.testing.assert_close(found["scores"], score.grad)


def test_a_scores_sigmoid_above_the_threshold_stays_and_half_a_percent_does_at_least():
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    method = soft_movement(steps=10, warmup=0, cooldown=5, threshold=0.5, strength=0)
    sparse = fxsparse.compile(model, Plan(sparsity=0.9, method=method))
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.0))
    sparse.attach(optimizer)
    scores = sparse.get_parameter("weight_scores")
    with torch.no_grad():
        scores.copy_(torch.arange(1200.0).view(30, 40) - 1000.5)
    for _ in range(5):
        sparse(torch.randn(2, 40)).sum().backward()
        optimizer.step()
    assert torch.equal(sparse.masks()["weight"], scores.detach() > 0)
    with torch.no_grad():
        scores.sub_(3000)
    optimizer.step()
    expected = torch.arange(1200).view(30, 40) >= 1194
    assert torch.equal(sparse.masks()["weight"], expected)


def test_the_penalty_thins_and_scores_have_their_own_rate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    method = soft_movement(steps=30, warmup=2, cooldown=5, strength=5.0, score_lr=10.0)
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=method))
    optimizer = torch.optim.AdamW(sparse.parameter_groups(0.02, weight_decay=0.1))
    sparse.attach(optimizer)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.02, 0.1), (0.2, 0.0)]
    counts = []
    for _ in range(30):
        optimizer.zero_grad()
        (sparse(torch.randn(12, 16)) - 1).square().mean().backward()
        optimizer.step()
        counts.append(sum(int(mask.sum()) for mask in sparse.masks().values()))
    assert counts[0] == 576
    assert 3 <= counts[-1] < 400
    assert sparse.penalty_norm > 0


def test_the_rule_and_the_penalty_share_one_threshold():
    method = soft_movement(steps=100, warmup=10, cooldown=20, threshold=0.2)
    assert isinstance(method.rule, AboveRising)
    assert isinstance(method.penalty, FewScores)
    assert method.rule.tau == method.penalty.tau == Rising(0.2, 10, 80)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "expected threshold as a number"),
        ({"strength": -1.0}, "expected strength as a number"),
        ({"score_lr": 0}, "expected score_lr as a number"),
        ({"steps": 10}, r"warmup \+ cooldown below the 10 steps"),
        ({"warmup": -1}, "warmup as an integer >= 0, got -1"),
        ({"warmup": None}, "warmup as an integer >= 0, got None"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        soft_movement(**options)
