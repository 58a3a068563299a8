from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.method import Probe
from fxsparse.methods import mest
from fxsparse.pattern import Unstructured
from fxsparse.storage import CompactWeight
from fxsparse.testing import view_of

EPOCH = 782


@pytest.mark.parametrize(
    ("soft", "upper", "lower"),
    [(False, [1000, 1000, 1000], [800, 900, 1000]), (True, [1200, 1100, 1000], [1000, 1000, 1000])],
)
def test_the_bounds_are_the_papers_table(soft, upper, lower):
    """0.92-0.91-0.9 (EM) and 0.88-0.89-0.9 (EM&S) of zeros at sparsity 0.9, from epochs 0, 90 and 120 of 160."""
    method = mest(soft=soft)
    for epochs, most, least in zip(
        (range(5, 90, 5), range(90, 120, 5), range(120, 160, 5)), upper, lower, strict=True
    ):
        for epoch in epochs:
            step = epoch * EPOCH
            assert method.schedule.fires(step)
            assert method.nnz(step, 1000, 10_000) == most
            share = method.schedule.drop_fraction(step)
            assert (1000 if soft else 1000 - round(1000 * share)) == least
    assert method.nnz(-1, 1000, 10_000) == upper[0]
    assert method.nnz(0, 5, 5) == 5
    assert not any(method.schedule.fires(epoch * EPOCH) for epoch in (0, 4, 160))


def chosen(method, step, weight, gradient, nnz, final):
    view = view_of(method, Unstructured(), weight, weight != 0, gradient, nnz, step, budget=final)
    return view, set(method.rule(replace(view, final=final)).tolist())


def test_the_lowest_score_goes_and_what_comes_is_random():
    """4 of 8 entries; EM's share of 0.25 drops one: by |w| the 1, by |w| + 2 |g| the 3, whose gradient is 0."""
    weight = torch.tensor([[4.0, -3, 0, 0], [1, 0, -2, 0]])
    gradient = torch.tensor([[0.0, 0, 9, 9], [5, 9, -3, 9]])
    options = {"steps": 100, "every": 1, "exchange": (0.25,), "phases": ()}
    for factor, gone in ((0.0, 4), (2.0, 1)):
        grown = set()
        for step in range(1, 30):
            _, new = chosen(mest(gradient=factor, **options), step, weight, gradient, 4, 4)
            assert len(new) == 4
            assert len(new & ({0, 1, 4, 6} - {gone})) == 3
            grown |= new - {0, 1, 4, 6}
        assert grown == {2, 3, 5, 7}


def test_a_soft_bound_drops_to_the_final_count_and_ends_on_it():
    weight = torch.tensor([[4.0, -3, 0.5, 0], [1, 0, -2, 0]])
    method = mest(steps=100, every=1, soft=True, exchange=(0.25, 0.0), phases=(0.5,))
    for step in range(1, 30):
        _, new = chosen(method, step, weight, weight, 5, 4)
        assert len(new) == 5
        assert {0, 1, 4, 6} <= new
    assert chosen(method, 60, weight, weight, 4, 4)[1] == {0, 1, 4, 6}


def test_it_reads_no_gradient_where_lambda_is_0_nor_moves_in_a_phase_without_exchange():
    weight = torch.tensor([[4.0, -3, 0, 0]])
    method = mest(steps=100, every=1, exchange=(0.5, 0.0), phases=(0.5,))
    view, _ = chosen(method, 10, weight, weight, 2, 2)
    forbidden = replace(view, active_gradient=lambda: pytest.fail("a gradient was read"))
    assert len(method.rule(forbidden)) == 2
    assert chosen(method, 50, weight, weight, 2, 2)[1] == {0, 1}


@pytest.mark.parametrize("gradient", [0.0, 0.01])
def test_compact_storage_trains_the_same_weights_as_masked(gradient):
    ends = []
    for storage in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        method = mest(steps=12, every=2, gradient=gradient, exchange=(0.3, 0.1), phases=(0.5,))
        sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=method, storage=storage))
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
        sparse.attach(optimizer)
        start = sparse.masks()
        for at in range(12):
            optimizer.zero_grad()
            x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at))
            (sparse(x) - 1).square().mean().backward()
            optimizer.step()
            if storage == "compact":
                for _, weight in sparse.weights():
                    assert isinstance(weight, CompactWeight)
                    assert weight.index.nnz == len(weight.values)
        assert any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())
        ends.append(sparse.dense_state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("before", [False, True], ids=["after the step", "instead of a step"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_under_grad_scaler_shows_the_rule_the_gradient_of_the_loss(kind, before, storage):
    seen, ends = [], []
    method = mest(steps=12, every=1, gradient=1.0, exchange=(0.3,), phases=())

    @dataclass(frozen=True)
    class Watched:
        probe: ClassVar[Probe] = Probe.NONE

        def __call__(self, view):
            seen.append(view.active_gradient().clone())
            return method.rule(view)

    schedule = replace(method.schedule, start=0 if before else 1, skip_step=before)
    for scale in (1.0, 256.0):
        torch.manual_seed(0)
        plan = Plan(sparsity=0.5, storage=storage, method=replace(method, rule=Watched(), schedule=schedule))
        sparse = fxsparse.compile(nn.Linear(16, 8), plan)
        optimizer = kind(sparse.parameters(), lr=0.1, fused=True)
        sparse.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(sparse(torch.ones(4, 16)).square().mean()).backward()
        scaler.step(optimizer)
        ends.append(sparse.masks()["weight"])
    torch.testing.assert_close(seen[0], seen[1])
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps as a number of optimizer steps, at least 1, got 0"),
        ({"soft": 1}, "soft as True"),
        ({"gradient": -0.1}, "lambda of |g|, as a number >= 0, got -0.1"),
        ({"exchange": (0.2, 0.1, 1.0)}, "exchange as shares from 0 to below 1"),
        ({"phases": (0.5,)}, "one exchange more than these"),
        ({"soft": True, "exchange": (0.2, 0.1, 0.1)}, "for soft=True a last one of 0"),
        ({"every": 70_000}, "an update in the last phase"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError) as error:
        mest(**options)
    assert message in str(error.value)
