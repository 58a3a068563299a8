import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxsparse import knapsack
from fxsparse.knapsack import Sharpness, afford, block_of, keep, utilities
from fxsparse.pattern import Block, Unstructured

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=4)


@given(SIZES, st.floats(0.01, 1.0), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_fewest_largest_are_kept_that_reach_the_budget(sizes, share, costed, tied, seed):
    generator = torch.Generator().manual_seed(seed)
    utility = [torch.rand(size, generator=generator) for size in sizes]
    if tied:
        utility = [(3 * u).round() for u in utility]
    costs = [float(1 + 2 * i) for i in range(len(sizes))] if costed else [2.0] * len(sizes)
    budget = share * sum(size * cost for size, cost in zip(sizes, costs, strict=True))
    masks = keep(utility, costs, budget)
    each = [cost for size, cost in zip(sizes, costs, strict=True) for _ in range(size)]
    expected, spent = set(), 0.0
    for place in torch.cat(utility).sort(descending=True, stable=True).indices.tolist():
        if spent >= budget * (1 - 1e-9):
            break
        expected.add(place)
        spent += each[place]
    assert set(torch.cat(masks).nonzero().flatten().tolist()) == expected


@given(SIZES, st.floats(0.05, 1.0), st.booleans(), st.integers(0, 99), st.sampled_from([10, 65_536]))
def test_what_a_price_with_bends_pays_for_is_kept_and_no_more(sizes, share, tied, seed, short):
    """Prices as of bytes: from a start on up a slope, and flat from half of the entries on."""
    generator = torch.Generator().manual_seed(seed)
    utility = [torch.rand(size, generator=generator) for size in sizes]
    if tied:
        utility = [(3 * u).round() for u in utility]

    def price(counts):
        return sum(5 + (2 + i) * min(n, sizes[i] // 2) for i, n in enumerate(counts))

    limit = 5 * len(sizes) + share * (price(sizes) - 5 * len(sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "SHORT", short)
        masks = afford(utility, price, limit)
    order = torch.cat(utility).sort(descending=True, stable=True).indices
    owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]
    most = max(
        n
        for n in range(len(order) + 1)
        if price(torch.bincount(owners[:n], minlength=len(sizes)).tolist()) <= limit
    )
    kept = torch.cat(masks)
    assert int(kept.sum()) == most
    assert bool(kept[order[:most]].all())


def test_long_ranges_are_halved_before_anything_is_sorted():
    torch.manual_seed(0)
    utility, costs = [torch.rand(300_000), torch.rand(200_000)], [1.0, 7.0]
    masks = keep(utility, costs, 400_000.0)
    spent = int(masks[0].sum()) + 7 * int(masks[1].sum())
    assert 400_000 <= spent < 400_007
    dropped = max(float(u[~m].max()) for u, m in zip(utility, masks, strict=True))
    assert dropped <= min(float(u[m].min()) for u, m in zip(utility, masks, strict=True))


def test_equal_magnitudes_go_to_the_first():
    masks = keep([torch.ones(3), torch.ones(4)], [1.0, 1.0], 4.0)
    assert [m.tolist() for m in masks] == [[True] * 3, [True, False, False, False]]


def test_the_sharpness_rises_linearly_and_by_the_root_of_a_block():
    sharpness = Sharpness(20.0, 16)
    # Of the reference at T = 20: 2.19, 3.38, ..., 20.0 at step 16.
    assert [round(sharpness(step), 2) for step in (0, 1, 2, 16, 40)] == [1.0, 2.19, 3.38, 20.0, 20.0]
    assert sharpness(16, 256) == pytest.approx(20 * math.sqrt(256))
    assert sharpness(0, 256) == 1.0


def test_the_utility_of_a_block_is_the_mean_of_its_magnitudes():
    weight = torch.arange(-8.0, 8.0).view(4, 4)
    assert block_of(Block(2, 4)) == (2, 4)
    assert block_of(Block(2, 4), transposed=True) == (4, 2)
    assert block_of(Unstructured()) == (1, 1)
    means = utilities(weight, (2, 2), 4.0)
    assert torch.equal(means, weight.abs().unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3)))
