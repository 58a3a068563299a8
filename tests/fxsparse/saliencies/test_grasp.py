import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import static
from fxsparse.saliencies import grasp
from fxsparse.scores import Scoring

BATCHES = [
    (torch.randn(7, 5, generator=torch.Generator().manual_seed(k)).double(), torch.arange(7) % 3)
    for k in range(2)
]
NAMES = ("0.weight", "2.weight")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(model, temperature):
    total = sum(F.cross_entropy(model(x) / temperature, y) for x, y in BATCHES)
    return torch.autograd.grad(total, [model.get_parameter(name) for name in NAMES])


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_hessian_times_gradient_is_that_of_finite_differences(temperature):
    model = net()
    found = grasp(Scoring(copy.deepcopy(model), NAMES, loss, BATCHES, 0.5), temperature)
    flow = gradients(model, temperature)
    size, ends = 1e-4 / float(sum(g.norm() for g in flow)), []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, g in zip(NAMES, flow, strict=True):
                moved.get_parameter(name).add_(g, alpha=sign * size)
        ends.append(gradients(moved, temperature))
    for name, plus, minus in zip(NAMES, *ends, strict=True):
        expected = -model.get_parameter(name).detach() * (plus - minus) / (2 * size)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[name] / scale, expected / scale, rtol=0, atol=1e-6)


def test_the_scores_make_masks_by_one_global_ranking():
    model = net().float()
    batches = [(x.float(), y) for x, y in BATCHES]
    plan = Plan(sparsity=0.5, method=static("grasp"), allocation="global_score")
    scores = fxsparse.saliency(model, plan, loss, batches)
    masks = fxsparse.compile(model, plan, initial_scores=scores).masks()
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    gone = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert len(kept) == 24
    assert kept.min() >= gone.max()
    assert not model._forward_hooks


def test_attention_has_its_second_derivative():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = self.inner(x[:, None]).chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))

    torch.manual_seed(0)
    scoring = Scoring(
        Attention(), ("inner.weight", "out.weight"), loss, [(torch.randn(2, 4), torch.tensor([0, 2]))], 0.5
    )
    assert float(grasp(scoring)["inner.weight"].abs().sum()) > 0


def test_bad_arguments_are_named():
    with pytest.raises(PlanError, match=r"a temperature above 0, got 0\."):
        grasp(Scoring(net(), NAMES, loss, BATCHES, 0.5), 0)
    with pytest.raises(PlanError, match="expected loss_fn"):
        grasp(Scoring(net(), NAMES, None, BATCHES, 0.5))

    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(PlanError, match=r"divides the model's output by 200.0: expected a tensor, got tuple"):
        grasp(Scoring(Pair(nn.Linear(5, 3).double()), ("0.weight",), loss, BATCHES, 0.5))
