import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import supermask
from fxsparse.methods.supermask import supermask_map


def test_scores_and_the_scale_learn_and_the_weight_does_not():
    weight = torch.tensor([1.0, -2, 3], requires_grad=True)
    scores, scale = torch.zeros(3, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    found = supermask_map(weight, torch.tensor([True, False, True]), scores, scale)
    assert found.tolist() == [0.5, 0.0, 1.5]
    found.backward(torch.tensor([1.0, 2.0, 5.0]))
    assert weight.grad is None
    assert scores.grad.tolist() == [0.5, -2.0, 7.5]
    assert float(scale.grad) == 16.0


def test_training_moves_masks_and_scales_and_leaves_the_drawn_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    drawn = model.get_parameter("0.weight").detach().clone()
    sparse = fxsparse.compile(model, Plan(sparsity=0.5, method=supermask(10.0), allocation="uniform"))
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.1, weight_decay=0.1), momentum=0.9)
    sparse.attach(optimizer)
    assert not sparse.get_parameter("0.weight").requires_grad
    first, x, losses = sparse.masks()["0.weight"].clone(), torch.randn(32, 16), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append((sparse(x) - x[:, :8]).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.7 * losses[0].item()
    mask, scale = sparse.masks()["0.weight"], sparse.get_parameter("0.weight_scale").detach()
    assert int(mask.sum()) == 192
    assert not torch.equal(mask, first)
    assert torch.equal(sparse.get_parameter("0.weight").detach(), drawn)
    assert float(scale) != 1
    torch.testing.assert_close(sparse.dense_state_dict()["0.weight"], scale * drawn * mask)


@pytest.mark.parametrize("score_lr", [0, -1.0, float("inf"), True])
def test_a_bad_option_is_named(score_lr):
    with pytest.raises(PlanError, match="expected score_lr as a multiple"):
        supermask(score_lr)
