from dataclasses import replace
from math import ceil

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import chase
from fxsparse.pattern import Unstructured
from fxsparse.testing import view_of


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.one = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.two = nn.Conv2d(16, 12, 3, padding=1, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        return self.head(x.mean((2, 3)))


class Normed(nn.Module):
    """The blocks of ResNet and MobileNetV2: what is added has BatchNorm behind it, a convolution is depthwise."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.basic = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.expand = nn.Sequential(nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12), nn.Dropout(0.1))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.basic(x)).relu()
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x.relu().mean((2, 3)))


def batch(at):
    generator = torch.Generator().manual_seed(at)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)


def trained(steps=24, model=Residual, **options):
    torch.manual_seed(0)
    method = chase(every=2, channel_every=4, stop=24, channel_stop=20, **options)
    plan = Plan(sparsity=0.8, method=method, storage="masked")
    sparse = fxsparse.compile(model(), plan, example_inputs=batch(0)[0])
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    sparse.attach(optimizer)
    history = []
    for at in range(steps):
        optimizer.zero_grad()
        x, y = batch(at)
        nn.functional.cross_entropy(sparse(x), y).backward()
        optimizer.step()
        gone = {n: sparse.get_buffer(f"{n}_gone").flatten(1)[:, 0].clone() for n in sparse.masks()}
        history.append((sparse.masks(), gone))
    return sparse, history


def test_channels_only_go_their_places_stay_empty_and_the_total_is_spent_elsewhere():
    sparse, history = trained(channel_sparsity=0.5, floor=0.2)
    total = sum(row["nnz"] for row in sparse.report.layers)
    counts, before = [], None
    for masks, gone in history:
        assert sum(int(mask.sum()) for mask in masks.values()) == total
        for name, mask in masks.items():
            assert not mask.flatten(1)[gone[name]].any()
            assert before is None or not (before[name] & ~gone[name]).any()
            assert int((~gone[name]).sum()) >= ceil(0.2 * len(mask))
        assert torch.equal(gone["stem.weight"], gone["two.weight"])
        assert not gone["head.weight"].any()
        counts.append(sum(int(flags.sum()) for flags in gone.values()))
        before = gone
    assert counts[:3] == [0, 0, 0]
    assert counts == sorted(counts)
    assert len(set(counts)) >= 4
    assert counts[-1] in (19, 20)  # half of 12 + 16 + 12, where two may go at once


def test_inference_is_really_smaller_and_computes_the_same():
    sparse, history = trained()
    x = batch(50)[0]
    expected = sparse.eval()(x).detach()
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    shapes = {row["name"]: tuple(row["shape"]) for row in fast.report.layers}
    gone = {name: int(flags.sum()) for name, flags in history[-1][1].items()}
    assert gone["stem.weight"] > 0
    assert shapes["stem.weight"][0] <= 12 - gone["stem.weight"]
    assert shapes["one.weight"][1] <= 12 - gone["stem.weight"]
    assert shapes["one.weight"][0] <= 16 - gone["one.weight"]


def test_rows_are_one_channel_through_batch_norm_dropout_and_depthwise_convolutions():
    sparse, history = trained(model=Normed)
    gone = {name.split(".")[0]: flags for name, flags in history[-1][1].items()}
    assert gone["stem"].any()
    assert not gone["stem"].all()
    assert torch.equal(gone["stem"], gone["basic"])
    assert torch.equal(gone["stem"], gone["project"])
    assert gone["expand"].any()
    assert torch.equal(gone["expand"], gone["depthwise"])
    x = batch(50)[0]
    expected = sparse.eval()(x).detach()
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    widths = {row["name"].split(".")[0]: row["shape"][0] for row in fast.report.layers}
    left, inside = 12 - int(gone["stem"].sum()), 16 - int(gone["expand"].sum())
    # A padded convolution reads channels that are gone: where BatchNorm's bias is not 0 there, one stands for all.
    assert widths["stem"] == widths["basic"] == widths["project"] <= left + 1
    assert widths["expand"] == widths["depthwise"] <= inside


def views(method, step, **weights):
    made = []
    for name, (weight, gradient, gone) in weights.items():
        state = {"gone": torch.tensor(gone)[:, None].expand(weight.shape)}
        view = view_of(method, Unstructured(), weight, weight != 0, gradient, 0, step, extras=state)
        made.append(replace(view, name=name))
    return made


def left(choices):
    return [choice.extras["gone"][:, 0].tolist() for choice in choices]


def test_the_least_channels_of_all_weights_go_down_to_the_floor():
    """Means of a: .1, .2, .3, 9; of b: 4, 5, 6, 7.  Of 8 four are to go: three of a, whose floor is one, then b's."""
    a = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.6, 0.0], [9.0, 9.0]]), torch.ones(4, 2), [False] * 4
    b = torch.tensor([[4.0, 4], [5, 5], [6, 6], [7, 7]]), torch.ones(4, 2), [False] * 4
    for floor, expected in (
        (0.25, [[True, True, True, False], [True, False, False, False]]),
        (0.5, [[True, True, False, False], [True, True, False, False]]),
    ):
        method = chase(every=1, channel_every=1, stop=10, channel_stop=1, floor=floor, drop_fraction=0)
        choices = method.rule.choose_all(views(method, 1, a=a, b=b), 6)
        assert left(choices) == expected
        assert sum(int(choice.entries.sum()) for choice in choices) == 6
    method = chase(every=1, channel_every=3, stop=10, channel_stop=1, floor=0.25)
    assert not any(map(any, left(method.rule.choose_all(views(method, 2, a=a, b=b), 6))))


def test_the_exchange_is_over_all_weights_by_magnitude_and_gradient():
    """Of 4 entries one goes, the 1 of a; of places in rows that are left the -5 of b has the largest gradient."""
    a = torch.tensor([[1.0, 2, 0], [0, 0, 0]]), torch.tensor([[0.0, 0, 3], [9, 9, 9]]), [False, True]
    b = torch.tensor([[3.0, 4, 0], [0, 0, 0]]), torch.tensor([[0.0, 0, 2], [0, -5, 0]]), [False, False]
    method = chase(every=1, channel_every=5, stop=10, channel_stop=5, drop_fraction=0.25)
    choices = method.rule.choose_all(views(method, 1, a=a, b=b), 4)
    assert choices[0].entries.int().tolist() == [[0, 1, 0], [0, 0, 0]]
    assert choices[1].entries.int().tolist() == [[1, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_sparsity": 1.0}, "channel_sparsity as a share from 0 to below 1, got 1.0"),
        ({"floor": -0.1}, "floor as a share from 0 to below 1, got -0.1"),
        ({"channel_sparsity": 0.9}, "floor <= 1 - channel_sparsity, got 0.2 and 0.9"),
        ({"channel_every": 1500}, "channel_every as a multiple of every=1000, got 1500"),
        ({"every": 0}, "expected every as an integer >= 1, got 0"),
        ({"every": "a"}, "expected every as an integer >= 1, got 'a'"),
        ({"channel_stop": 0}, "expected channel_stop as an integer >= 1, got 0"),
        (
            {"every": 1, "channel_every": 3, "stop": 10, "channel_stop": 10},
            "channel_stop at or before the last multiple of channel_every=3 below stop=10, got 10",
        ),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        chase(**options)
