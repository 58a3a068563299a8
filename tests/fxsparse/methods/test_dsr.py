import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import dsr
from fxsparse.methods.dsr import ThresholdAndReallocate
from fxsparse.pattern import Unstructured
from fxsparse.selection import to_positions
from fxsparse.testing import view_of


def views(threshold, *weights, step=1):
    method, made = dsr(every=1), []
    for name, weight in zip("abc", weights, strict=False):
        state = {"threshold": torch.tensor(threshold)}
        view = view_of(method, Unstructured(), weight, weight != 0, weight, 0, step, extras=state)
        generator = torch.Generator().manual_seed(step * 7 + ord(name))
        made.append(replace(view, name=name, generator=generator))
    return made


def chosen(wanted, given):
    total = sum(len(view.active) for view in given)
    choices = ThresholdAndReallocate(wanted).choose_all(given, total)
    assert sum(len(choice.entries) for choice in choices) == total
    return choices


def filled(numel, *parts):
    """A weight of one row whose first entries are `count` times `value` for every part."""
    weight = torch.zeros(1, numel)
    at = 0
    for count, value in parts:
        weight[0, at : at + count] = value
        at += count
    return weight


def test_where_most_survive_most_is_grown_and_nothing_that_was_just_dropped():
    """nnz 100, 300, 50 of which 40, 10, 10 are below H: 60 come back as 9.23, 44.62, 6.15."""
    weights = [filled(1000, (d, 0.01), (n - d, 1.0)) for n, d in ((100, 40), (300, 10), (50, 10))]
    for step in range(1, 6):
        choices = chosen(60, views(0.1, *weights, step=step))
        assert [len(choice.entries) for choice in choices] == [60 + 9, 290 + 45, 40 + 6]
        for choice, weight in zip(choices, weights, strict=True):
            new, old = set(choice.entries.tolist()), set(to_positions(weight != 0).tolist())
            stay = set(to_positions(weight == 1).tolist())
            assert new & old == stay
            assert choice.entries.tolist() == sorted(new)


def test_growth_is_anywhere():
    seen = set()
    for step in range(1, 60):
        choice = chosen(1, views(0.1, filled(8, (1, 0.01), (2, 1.0)), step=step))[0]
        seen |= set(choice.entries.tolist())
    assert seen == {1, 2, 3, 4, 5, 6, 7}


def test_the_threshold_follows_what_it_drops():
    """Wanted 10: 12 are more than 11, 8 fewer than 9, and between the two it stays."""
    for dropped, factor in ((12, 0.5), (11, 1.0), (10, 1.0), (9, 1.0), (8, 2.0), (0, 2.0)):
        given = views(0.25, filled(100, (dropped, 0.1), (30, 0.25)), filled(100, (20, 1.0)))
        choices = chosen(10, given)
        assert [float(choice.extras["threshold"]) for choice in choices] == [0.25 * factor] * 2
    rule = ThresholdAndReallocate(0.1)
    assert [rule.feedback(dropped, 100) for dropped in (12, 10, 8)] == [0.5, 1.0, 2.0]


def test_one_entry_of_every_weight_stays():
    choices = chosen(3, views(10.0, filled(9, (1, 1.0), (1, 3.0), (1, 2.0)), filled(9, (2, 1.0))))
    assert 1 in choices[0].entries.tolist()
    assert 0 in choices[1].entries.tolist()


def test_what_does_not_fit_goes_elsewhere_or_comes_back():
    """The large weight has one free place, the small one 7; then the largest of what was dropped stay."""
    full, small = filled(20, (5, 0.01), (14, 1.0)), filled(10, (3, 1.0))
    a, b = chosen(5, views(0.1, full, small))
    assert (len(a.entries), len(b.entries)) == (14 + 1, 3 + 4)
    tight = torch.tensor([[0.02, 0.05, 0.03, 1.0, 0.0]])
    assert chosen(3, views(0.1, tight))[0].entries.tolist() == [1, 2, 3, 4]


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    method = dsr(every=2, exchange=0.3, threshold=0.01)
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=method))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    sparse.attach(optimizer)
    return sparse, optimizer


def train(sparse, optimizer, steps):
    found = []
    for at in steps:
        optimizer.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at))
        (sparse(x) - 1).square().mean().backward()
        optimizer.step()
        found.append([float(sparse.get_buffer(f"{n}.weight_threshold")) for n in "02"])
    return found


def test_the_threshold_is_state_that_a_checkpoint_takes_along():
    sparse, optimizer = build()
    start = {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    train(sparse, optimizer, range(6))
    saved = {name: value.clone() for name, value in sparse.state_dict().items()}
    held = copy.deepcopy(optimizer.state_dict())
    assert float(saved["0.weight_threshold"]) == float(saved["2.weight_threshold"]) != 0.01
    assert not any("threshold" in name for name in sparse.dense_state_dict())
    other, again = build()
    other.load_state_dict(saved)
    again.load_state_dict(held)
    assert train(other, again, range(6, 14)) == train(sparse, optimizer, range(6, 14))
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    counts = {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    assert sum(counts.values()) == sum(start.values())
    assert counts != start


def test_the_period_doubles_where_it_is_told_to():
    schedule = dsr(every=10, stop=200, double=(30, 100)).schedule
    assert schedule.at == (10, 20, 30, 50, 70, 90, 110, 150, 190)
    assert dsr(every=10).schedule.updates(45) == range(10, 45, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": 0}, "exchange as a number above 0, got 0"),
        ({"threshold": float("inf")}, "threshold as a number above 0, got inf"),
        ({"double": (5,)}, "double as ascending steps below stop"),
        ({"double": 5}, "double as a sequence of steps, got 5"),
        ({"double": (5,), "every": "a"}, "every as an integer"),
        ({"double": (50, 20), "stop": 100}, "double as ascending steps below stop"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        dsr(**options)
