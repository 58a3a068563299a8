from dataclasses import replace

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.errors import PlanError
from fxsparse.link_prediction import cht_scores
from fxsparse.methods import cht
from fxsparse.methods.cht import RemoveAndPredict
from fxsparse.pattern import Unstructured
from fxsparse.selection import to_mask
from fxsparse.testing import view_of

LINKS = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])


def view(weight, step=1, nnz=None, feeds=(), name="w", method=None):
    method = method or cht(every=1, steps=100, drop_fraction=0.25, decay="constant")
    mask = weight != 0
    made = view_of(method, Unstructured(), weight, mask, weight, nnz or int(mask.sum()), step)
    seed = torch.Generator().manual_seed(step * 1000 + len(name))
    return replace(made, name=name, feeds=feeds, generator=seed)


def test_hard_removal_and_growth_take_the_smallest_and_the_best_predicted():
    """Without the 0.1 at (0, 0), (0, 2), (1, 3) and (2, 1) are predicted equally: the first comes."""
    weight = LINKS * torch.tensor([[0.1, 2, 1, 1], [1, 3, 4, 1], [1, 1, 5, 6]])
    given = view(weight, method=cht(every=1, steps=100, drop_fraction=0.2, decay="constant", soft=False))
    found = to_mask(RemoveAndPredict("ch3", False, 100)(given), (3, 4))
    assert found.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_growth_is_uniform_where_nothing_is_predicted():
    """One link of a weight predicts nothing at all."""
    weight = torch.tensor([[5.0, 0.1, 0], [0, 0, 0]])
    for soft in (False, True):
        method = cht(every=1, steps=100, drop_fraction=0.5, decay="constant", soft=soft)
        seen = set()
        for step in range(1, 60):
            found = RemoveAndPredict("ch3", soft, 100)(view(weight, step=step, method=method)).tolist()
            assert len(found) == 2
            seen |= set(found)
        assert seen == {0, 1, 2, 3, 4, 5}


def test_soft_removal_is_weighted_by_a_power_that_grows_from_1_to_3():
    """Of magnitudes 1 and 3 one stays: the 3 in 3/4 of the cases at first, in 27/28 at the end."""
    weight = torch.tensor([[1.0, 3.0]])
    method = cht(every=1, steps=10_000, drop_fraction=0.5, decay="constant")
    for step, expected in ((1, 0.75), (20_000, 27 / 28)):
        rule = RemoveAndPredict("ch3", True, 10_000)
        stays = [
            rule._kept(
                replace(view(weight, step=step, method=method), generator=torch.Generator().manual_seed(k))
            )
            for k in range(400)
        ]
        share = sum(int(kept[0]) for kept in stays) / 400
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 400) ** 0.5)


def test_soft_growth_is_weighted_by_the_scores():
    """Two links of CH3 worth 2 and 1/2 + 1/2 + ... are drawn as often as their scores say."""
    links = torch.tensor([[1.0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    scores = cht_scores(links, "ch3").masked_fill(links != 0, 0)
    expected = scores / scores.sum()
    rule, drawn = RemoveAndPredict("ch3", True, 100), torch.zeros(3, 5)
    for k in range(600):
        given = replace(view(links, nnz=8), generator=torch.Generator().manual_seed(k))
        drawn += to_mask(rule._grown(given, links != 0), (3, 5)).float() * (links == 0)
    torch.testing.assert_close(drawn / 600, expected, atol=0.07, rtol=0)
    assert not drawn[scores == 0].any()


def test_broken_chains_go_whole_and_counts_stay():
    """Neuron 0 of a loses its only link in, neuron 2 has none out: their other links are freed and grown again."""
    a = torch.tensor([[0.1, 0, 0], [0, 4, 5], [6, 0, 7]])
    b = torch.tensor([[3.0, 4, 0], [5, 6, 0], [0, 7, 0]])
    rule, kept = RemoveAndPredict("ch3", False, 100), {}

    def watched(self, given, links):
        kept[given.name] = links.clone()
        return RemoveAndPredict._grown(rule, given, links)

    method = cht(every=1, steps=100, drop_fraction=0.2, decay="constant", soft=False)
    given = [
        view(b, name="b", method=method),
        view(a, name="a", feeds=("b",), method=method),
    ]
    spy = type("Spy", (RemoveAndPredict,), {"_grown": watched})("ch3", False, 100)
    found = spy.choose_all(given, 10)
    assert [len(positions) for positions in found] == [5, 5]
    assert kept["a"].int().tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert kept["b"].int().tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_the_share_that_goes_falls_to_0_along_a_cosine():
    """Seen by the rule as `view.drop_fraction`; constant, draws of large weights go on to the end."""
    curve = cht(every=10, steps=100).schedule.drop_fraction
    assert [curve(step) for step in (0, 50, 100)] == pytest.approx([0.3, 0.15, 0])
    assert cht(every=10, steps=100, decay="constant").schedule.drop_fraction(90) == 0.3


@pytest.mark.parametrize("soft", [False, True])
def test_it_trains_finds_its_chain_and_asks_for_no_gradient(soft):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    method = cht(every=2, steps=20, soft=soft)
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=method, overrides=[Override("2.*", 0.5)]))
    assert int(sparse.masks()["2.weight"].sum()) == 96
    assert sparse._emitted.targets["0.weight"].feeds == ("2.weight",)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    sparse.attach(optimizer)
    start = sparse.masks()
    for at in range(10):
        optimizer.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at))
        (sparse(x) - 1).square().mean().backward()
        optimizer.step()
    for name, mask in sparse.masks().items():
        assert int(mask.sum()) == int(start[name].sum())
        assert not torch.equal(mask, start[name])


def test_a_weight_whose_scores_would_not_fit_is_refused_by_name():
    weight = torch.zeros(1, 9000)
    weight[0, :2] = 1
    with pytest.raises(PlanError, match=r"w: cht scores all pairs .* up to 8192 x 8192, got 1 x 9000"):
        RemoveAndPredict("ch3", True, 100)(view(weight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "l3"}, "score as one of ch3, ch2, got 'l3'"),
        ({"soft": 1}, "soft as True"),
        ({"decay": "slow"}, "decay as one of constant, cosine, linear, cubic, got 'slow'"),
        (
            {"decay": "constant", "steps": None},
            "steps as a number of optimizer steps, at least 391, got None",
        ),
        ({"steps": None}, "steps as a number of optimizer steps, at least 391, got None"),
        ({"every": 10, "steps": 9}, "steps as a number of optimizer steps, at least 10, got 9"),
        ({"every": 0}, "every as an integer >= 1, got 0"),
        ({"drop_fraction": 2}, "drop fraction as a number from 0 to 1, got 2"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        cht(**options)
