from dataclasses import replace

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import granet
from fxsparse.methods.granet import CutAndRegrow
from fxsparse.pattern import Unstructured
from fxsparse.selection import to_mask
from fxsparse.testing import view_of


def test_the_count_falls_along_the_papers_cubic_and_ends_on_the_target():
    method = granet(every=1, start=0, ramp=10, stop=20)
    found = [method.nnz(step, 100, 1000) for step in range(11)]
    assert found == [500, 392, 305, 237, 186, 150, 126, 111, 103, 100, 100]


def test_the_share_that_is_exchanged_falls_over_all_of_training():
    curve = granet(every=1, start=0, ramp=10, stop=100).schedule.drop_fraction
    expected = [0.5, 0.427509, 0.2525, 0.077491, 0.005]
    assert [curve(step) for step in (0, 25, 50, 75, 100)] == pytest.approx(expected, abs=5e-7)


def views(step, method, nnz):
    weight = torch.tensor([[9.0, -8, 1, 0], [3, 2, 0.5, 0]])
    other = torch.tensor([[7.0, 0.1], [6, 0]])
    gradients = (torch.tensor([[0.0, 0, 9, 1], [0, 0, 0, 2]]), torch.tensor([[0.0, 4], [0, 5]]))
    made = []
    for name, tensor, gradient in zip("ab", (weight, other), gradients, strict=True):
        view = view_of(method, Unstructured(), tensor, tensor != 0, gradient, nnz, step)
        made.append(replace(view, name=name))
    return made


def test_one_cut_over_all_weights_then_an_exchange_in_each():
    """Kept by the cut to 6: 9, 8, 3, 2 of a and 7, 6 of b.  Then ceil(4 / 4) and ceil(2 / 4) go by magnitude, and
    come by gradient: of a the entry of gradient 9, which the cut had dropped, of b that of gradient 5."""
    method = granet(every=1, start=0, ramp=10, stop=20, drop_fraction=0.25, final_drop_fraction=0.25)
    chosen = CutAndRegrow().choose_all(views(2, method, 0), 6)
    assert [to_mask(c, s).tolist() for c, s in zip(chosen, ((2, 4), (2, 2)), strict=True)] == [
        [[True, True, True, False], [True, False, False, False]],
        [[True, False], [False, True]],
    ]


def test_without_an_exchange_it_is_global_magnitude_pruning():
    method = granet(every=1, start=0, ramp=10, stop=20, drop_fraction=0.0, final_drop_fraction=0.0)
    chosen = CutAndRegrow().choose_all(views(2, method, 0), 3)
    assert [c.tolist() for c in chosen] == [[0, 1], [0]]


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_run_starts_at_the_allocations_shares_and_ends_on_the_plans_total(start):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    method = granet(every=2, start=0, ramp=8, stop=14, initial_sparsity=start)
    sparse = fxsparse.compile(model, Plan(sparsity=0.9, method=method))
    expected = fxsparse.allocate(model, Plan(sparsity=start, method=fxsparse.methods.static()))
    assert {name: int(mask.sum()) for name, mask in sparse.masks().items()} == expected
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    counts, moved = [], 0
    for at in range(14):
        optimizer.zero_grad()
        (sparse(torch.randn(12, 16)) - 1).square().mean().backward()
        before = sparse.masks()
        optimizer.step()
        masks = sparse.masks()
        counts.append(sum(int(mask.sum()) for mask in masks.values()))
        moved += at > 8 and any(not torch.equal(before[name], masks[name]) for name in masks)
        if at > 8:
            assert [int(m.sum()) for m in masks.values()] == [int(m.sum()) for m in before.values()]
    assert counts[0] == sum(expected.values())
    assert counts[1::2] == [method.nnz(step, 57, 576) for step in range(2, 15, 2)]
    assert counts[-1] == 57
    assert moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ramp": 1500}, "ramp - start as a multiple of every above 0, got 1500 - 0 and 1000"),
        ({"ramp": "a"}, "ramp - start as a multiple of every above 0, got 'a' - 0 and 1000"),
        ({"every": 0}, "expected every as an integer >= 1, got 0"),
        ({"every": "a"}, "expected every as an integer >= 1, got 'a'"),
        ({"stop": 43_000}, "expected stop, the end of training, after the ramp, got 43000 and 43000"),
        ({"initial_sparsity": 1.5}, "initial_sparsity as a number from 0 to 1"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        granet(**options)


def test_a_start_that_is_sparser_than_the_end_is_refused():
    with pytest.raises(PlanError, match=r"granet starts at sparsity 0.95 and ends at the plan's, 0.9"):
        fxsparse.allocate(nn.Linear(8, 8), Plan(sparsity=0.9, method=granet(initial_sparsity=0.95)))
