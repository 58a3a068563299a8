import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import NumericsError, PlanError
from fxsparse.methods import static
from fxsparse.saliencies import synflow
from fxsparse.scores import Scoring


def mlp(*widths, bias=False):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


def scored(model, inputs, density=1.0, rounds=1, names=None):
    names = tuple(n for n, p in model.named_parameters() if p.dim() > 1) if names is None else names
    return synflow(Scoring(copy.deepcopy(model), names, None, [], density, inputs), rounds)


def test_values_worked_out_beforehand():
    model = mlp(2, 2, 1)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2], [0.5, 0]]))
        model[2].weight.copy_(torch.tensor([[3.0, -1]]))
    found = scored(model, torch.zeros(1, 2))
    assert found["0.weight"].tolist() == [[3.0, 6.0], [0.5, 0.0]]
    assert found["2.weight"].tolist() == [[9.0, 0.5]]
    assert found["0.weight"].dtype == torch.float64


def test_what_flows_into_a_neuron_flows_out_and_every_layer_has_all_of_it():
    model = mlp(6, 10, 9, 4, bias=True)  # biases take no part
    first, second, third = scored(model, torch.zeros(1, 6)).values()
    assert float(first.sum()) == pytest.approx(float(third.sum()), rel=1e-14)
    for before, after in ((first, second), (second, third)):
        torch.testing.assert_close(before.sum(1), after.sum(0), rtol=1e-13, atol=0)


def test_one_round_empties_layers_where_a_hundred_do_not():
    model = mlp(64, 256, 256, 256, 8)
    for rounds, empties in ((1, True), (100, False)):
        found = scored(model, torch.zeros(1, 64), 0.003, rounds)
        cut = torch.cat([s.flatten() for s in found.values()]).sort(descending=True).values[448]
        counts = [int((s >= cut).sum()) for s in found.values()]
        assert sum(counts) == 449
        assert (min(counts) == 0) == empties


def test_what_went_earlier_ranks_lower_and_survivors_carry_the_flow_alone():
    model = mlp(6, 10, 4)
    found = scored(model, torch.zeros(1, 6), 0.25, 3)
    joined = torch.cat([s.flatten() for s in found.values()])
    counts = [int((joined >= low).sum()) for low in (0, -1, -2, -3)]
    assert counts == [25, round(100 * 0.25 ** (2 / 3)), round(100 * 0.25 ** (1 / 3)), 100]
    flows = [float(s.clamp_min(0).sum()) for s in found.values()]
    assert min(flows) > 0


def test_a_net_with_batch_norm_branches_and_dropout_is_scored_in_eval_mode_and_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
            self.norm.running_mean.fill_(-2.0)

        def forward(self, x):
            x = F.relu(self.norm(self.first(x)))
            x = F.dropout(x + F.relu(self.second(x)), training=self.training)
            return self.last(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan(sparsity=0.8, method=static("synflow"), allocation="global_score")
    image = torch.randn(1, 2, 5, 5)
    scores = fxsparse.saliency(model, plan, example_inputs=image)
    again = fxsparse.saliency(model, plan, example_inputs=image.to("meta"))
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training
    masks = fxsparse.compile(model, plan, initial_scores=scores, example_inputs=image).masks()
    assert all(bool((scores[name][mask] > 0).all()) for name, mask in masks.items())


@pytest.mark.parametrize("between", [nn.LayerNorm(8), nn.Softmax(-1), nn.Sigmoid(), nn.Tanh()])
def test_a_net_that_does_not_conserve_the_flow_is_refused(between):
    model = nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 4))
    with pytest.raises(PlanError, match=r"expected a model whose output grows as its input.*Use snip"):
        scored(model, torch.zeros(2, 6))


def test_bad_arguments_and_a_net_without_flow_are_named():
    model = mlp(6, 8, 4)
    with pytest.raises(PlanError, match="expected example_inputs with a tensor of floats, got none"):
        scored(model, None)
    with pytest.raises(PlanError, match="got no such tensor"):
        scored(model, torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(PlanError, match=r"rounds as an integer >= 1, got 0\."):
        scored(model, torch.zeros(1, 6), rounds=0)
    nn.init.zeros_(model[0].weight)
    with pytest.raises(NumericsError, match="expected a flow above 0 through the model, got 0"):
        scored(model, torch.zeros(1, 6))


def test_a_deep_net_overflows_nothing_that_single_precision_would():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(40)))
    for layer in model:
        nn.init.constant_(layer.weight, 1.0)  # a flow of 64 ** 41, above 1e73
    found = scored(model, torch.zeros(1, 64))
    assert all(torch.equal(score, torch.full_like(score, 64.0**39)) for score in found.values())
