from dataclasses import replace

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.errors import PlanError
from fxsparse.method_checks import view_of
from fxsparse.methods import mst
from fxsparse.pattern import Unstructured
from fxsparse.topk import top_mask


def test_counts_follow_the_table_and_end_on_the_plans():
    method = mst((0.5, 0.9), (10, 20), restore=40, stop=60, every=5)
    found = [method.nnz(step, 300, 1000) for step in (-1, 5, 10, 14, 15, 20, 39, 40, 59)]
    assert found == [1000, 1000, 500, 500, 500, 100, 100, 300, 300]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    sparse = fxsparse.compile(
        model, Plan(sparsity=0.75, method=mst((0.5, 0.9), (2, 4), restore=6, stop=9, every=2))
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    sparse.attach(optimizer)
    counts = []
    for _ in range(8):
        optimizer.zero_grad()
        (sparse(torch.randn(12, 16)) - 1).square().mean().backward()
        optimizer.step()
        counts.append(sum(int(mask.sum()) for mask in sparse.masks().values()))
    assert counts == [576, 288, 288, 57, 57, 144, 144, 144]


def test_a_weight_that_is_kept_dense_costs_what_a_dense_one_does_in_every_phase():
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False))
    plan = Plan(sparsity=0.5, method=mst((0.5,), (1,), restore=50, stop=100, every=50))
    kept = replace(plan, overrides=(Override("1", sparsity=0),))
    both, one = (fxsparse.count_flops(model, torch.randn(1, 16), p).train_ratio for p in (plan, kept))
    assert both < 0.8
    assert one == pytest.approx((1 + both) / 2)


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_three_of_four_are_grown_by_the_gradient_and_the_rest_anywhere(share):
    method = mst((0.9,), (0,), restore=1, stop=10**6, every=10, drop_fraction=0.5, gradient_share=share)
    random = torch.Generator().manual_seed(0)
    weight, gradient = torch.rand(40, 50, generator=random), torch.rand(40, 50, generator=random)
    mask = torch.zeros(2000, dtype=torch.bool)
    mask[::10] = True
    mask = mask.view(40, 50)
    view = view_of(method, Unstructured(), weight * mask, mask, gradient, 200, 10)
    grown = torch.zeros(2000, dtype=torch.bool)
    grown[method.rule(view)] = True
    assert int(grown.sum()) == 200
    kept = 200 - int(200 * method.schedule.drop_fraction(10))
    stays = top_mask((weight * mask).flatten(), kept)
    assert bool(grown[stays].all())
    order = gradient.flatten().masked_fill(stays, -1).argsort(descending=True)
    best = int(grown[order[: 200 - kept]].sum())
    wanted = round(share * (200 - kept))
    # what is grown anywhere may be among the best by chance: 100 of 1900 places
    assert wanted <= best <= wanted + 12
    assert bool(grown[order[:wanted]].all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_share": 1.5}, "expected gradient_share as a number from 0 to 1"),
        ({"levels": (0.5,)}, "expected levels and at as tuples of one length"),
        ({"levels": 0.5}, "expected levels and at as tuples"),
        ({"restore": 599_950}, "expected an update between restore and stop"),
        ({"at": (100, 50)}, "expected a table of ascending steps"),
        ({"every": 0}, "expected every as an integer >= 1"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        mst(**options)
