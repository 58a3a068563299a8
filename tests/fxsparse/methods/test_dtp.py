import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import dtp
from fxsparse.methods.dtp import LEAST_EPS, dtp_map
from fxsparse.topk import sinkhorn_topk, soft_topk

SCORES = torch.tensor([2.0, 1, 0, -1], dtype=torch.float64)
MASK = torch.tensor([True, True, False, False])
SHARP = torch.tensor(2.0)  # eps 0.5


def test_values_worked_out_beforehand_and_what_is_below_is_cut():
    expected = torch.tensor([0.952574, 0.731059, 0.268941, 0.047426], dtype=torch.float64)
    torch.testing.assert_close(soft_topk(SCORES, 2, beta=2.0), expected, atol=1e-6, rtol=0)
    found = dtp_map(torch.full((4,), 3.0, dtype=torch.float64), MASK, SCORES, SHARP)
    torch.testing.assert_close(found, 3 * expected * MASK, atol=4e-6, rtol=0)


def test_the_gradient_is_that_of_the_soft_product_by_finite_differences():
    weight = torch.tensor([1.0, -2, 3, 0.5], dtype=torch.float64, requires_grad=True)
    scores = SCORES.clone().requires_grad_()
    upstream = torch.tensor([1.0, 2, -1, 3], dtype=torch.float64)
    dtp_map(weight, MASK, scores, SHARP).backward(upstream)
    soft = soft_topk(SCORES, 2, beta=2.0)
    torch.testing.assert_close(weight.grad, upstream * soft)
    for at in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[at] = 1e-5
        ends = [
            (upstream * weight.detach() * soft_topk(SCORES + s * step, 2, beta=2.0)).sum() for s in (1, -1)
        ]
        assert float(scores.grad[at]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6)
    assert scores.grad[2:].abs().min() > 0


def test_t_proximal_steps_are_the_temperature_over_t_and_keep_the_sum():
    """logit m(t+1) = logit m(t) + s / eps + a shift that restores sum m = k, from the same m everywhere."""
    eps, k = 0.7, 12
    scores = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = torch.full((50,), k / 50, dtype=torch.float64).logit()
    for t in range(1, 6):
        logits = logits + scores / eps
        low, high = -200.0, 200.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float(torch.sigmoid(logits + middle).sum()) < k else (low, middle)
        logits = logits + low
        direct = soft_topk(scores, k, beta=t / eps)
        torch.testing.assert_close(torch.sigmoid(logits), direct, atol=1e-9, rtol=0)
        assert float(direct.sum()) == pytest.approx(k, abs=1e-9)
    swept = float(sinkhorn_topk(scores, k, beta=5 / eps, iterations=1).sum())
    assert abs(swept - k) > 0.1  # single sweeps miss the budget


def test_sharpness_grows_with_the_steps_and_scores_learn_at_their_own_rate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    sparse = fxsparse.compile(
        model, Plan(sparsity=0.8, method=dtp(eps=0.5, every=2, score_lr=5.0), allocation="uniform")
    )
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.1, weight_decay=0.01))
    sparse.attach(optimizer)
    assert [(g["lr"], g.get("weight_decay")) for g in optimizer.param_groups] == [(0.1, 0.01), (0.5, 0.0)]
    start = sparse.get_parameter("0.weight_scores").detach().clone()
    assert float(start.mean()) == pytest.approx(1, rel=1e-5)
    seen = [float(sparse.get_buffer("0.weight_sharpness"))]
    for _ in range(40):
        optimizer.zero_grad()
        (sparse(torch.randn(12, 16)) - 1).square().mean().backward()
        optimizer.step()
        seen.append(float(sparse.get_buffer("0.weight_sharpness")))
        assert int(sparse.masks()["0.weight"].sum()) == 77
    assert seen[:5] == [2, 2, 4, 4, 6]
    scores, mask = sparse.get_parameter("0.weight_scores").detach(), sparse.masks()["0.weight"]
    assert not torch.equal(scores, start)
    assert scores[mask].min() >= scores[~mask].max()
    soft = soft_topk(scores, 77, beta=seen[-1])
    expected = sparse.get_parameter("0.weight").detach() * soft * mask
    torch.testing.assert_close(sparse.dense_state_dict()["0.weight"], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "expected eps as a number >= 1e-06, got 0"),
        ({"eps": 1e-30}, "expected eps as a number >= 1e-06, got 1e-30"),
        ({"score_lr": float("nan")}, "expected score_lr as a number above 0, got nan"),
        ({"every": 0.5}, "expected every as an integer >= 1"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        dtp(**options)


def test_the_least_eps_trains():
    sparse = fxsparse.compile(nn.Linear(16, 24), Plan(sparsity=0.8, method=dtp(eps=LEAST_EPS)))
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.1))
    sparse.attach(optimizer)
    sparse.get_buffer("fxsparse_step").fill_(10**6)
    for _ in range(2):
        optimizer.zero_grad()
        (sparse(torch.randn(12, 16)) - 1).square().mean().backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in sparse.parameters())
    assert int(sparse.masks()["weight"].sum()) == 76
