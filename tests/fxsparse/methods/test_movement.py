import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import movement
from fxsparse.methods.movement import largest, movement_map, ranks
from fxsparse.pattern import NM, Unstructured
from fxsparse.topk import top_mask


def test_scores_learn_by_gradient_times_weight_and_only_kept_weights_learn():
    weight = torch.tensor([1.0, -2, 3], requires_grad=True)
    scores = torch.zeros(3, requires_grad=True)
    found = movement_map(weight, torch.tensor([True, False, True]), scores)
    assert found.tolist() == [1.0, 0.0, 3.0]
    found.backward(torch.tensor([1.0, 2.0, 5.0]))
    assert weight.grad.tolist() == [1.0, 0.0, 5.0]
    assert scores.grad.tolist() == [1.0, -4.0, 15.0]


def test_the_share_kept_follows_the_papers_cubic():
    method = movement(steps=1000, warmup=100, cooldown=200)
    found = [method.nnz(step, 150_000, 1_000_000) / 1e6 for step in (0, 100, 275, 450, 625, 800, 801, 1000)]
    assert found == pytest.approx([1, 1, 0.508594, 0.25625, 0.163281, 0.15, 0.15, 0.15], abs=1e-6)


def test_equal_scores_go_by_magnitude_and_then_by_place():
    scores, sizes = torch.tensor([0.0, 1, 0, 0]), torch.tensor([5.0, 0, 7, 5])
    assert ranks(scores, sizes).tolist() == [1, 3, 2, 0]


def test_scores_that_learn_at_the_rate_of_the_weights_are_warned_of():
    method = movement(steps=20, warmup=2, cooldown=5, score_lr=10.0)
    sparse = fxsparse.compile(nn.Linear(16, 24), Plan(sparsity=0.8, method=method))
    with pytest.warns(
        UserWarning, match="'weight_scores' learns at the rate of the weights, expected 10 times"
    ):
        sparse.attach(torch.optim.SGD(sparse.parameters(), lr=0.1))


@pytest.mark.parametrize("values", [1, 2, 3, 60])
@pytest.mark.parametrize("nnz", [0, 1, 17, 59, 60])
def test_the_best_scores_are_those_of_all_ranks(values, nnz):
    generator = torch.Generator().manual_seed(values)
    scores = torch.randint(values, (5, 12), generator=generator).float() - 1
    sizes = torch.randint(3, (5, 12), generator=generator).float()
    assert largest(Unstructured(), scores, sizes, nnz).equal(top_mask(ranks(scores, sizes), nnz))


def test_the_best_scores_fit_the_pattern():
    scores, sizes = torch.tensor([[0.0, 0, 0, 1]]), torch.tensor([[5.0, 7, 5, 0]])
    assert largest(NM(2, 4), scores, sizes, 2).tolist() == [[False, True, False, True]]


def test_scores_are_learned_without_decay_at_their_own_rate_and_are_gone_from_the_dense_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    keys = list(model.state_dict())
    method = movement(steps=20, warmup=2, cooldown=5, score_lr=10.0)
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=method, allocation="uniform"))
    optimizer = torch.optim.AdamW(sparse.parameter_groups(0.01, weight_decay=0.1))
    sparse.attach(optimizer)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.1), (0.1, 0.0)]
    for _ in range(20):
        optimizer.zero_grad()
        (sparse(torch.randn(12, 16)) - 1).square().mean().backward()
        optimizer.step()
    scores = sparse.get_parameter("0.weight_scores").detach()
    mask = sparse.masks()["0.weight"]
    assert int(mask.sum()) == 77
    assert scores[mask].min() >= scores[~mask].max()
    assert list(sparse.dense_state_dict()) == keys
    assert list(sparse.to_dense().state_dict()) == keys
    assert "0.weight_scores" in sparse.state_dict()
    fast = fxsparse.compile(sparse.eval(), mode="infer")
    assert not [key for key in fast.state_dict() if "scores" in key or "mask" in key]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_lr": 0}, "score_lr as a multiple"),
        ({"steps": 10}, r"warmup \+ cooldown below the 10 steps"),
        ({"cooldown": -10}, "cooldown as an integer >= 0, got -10"),
        ({"steps": "100"}, "steps as an integer"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        movement(**options)
