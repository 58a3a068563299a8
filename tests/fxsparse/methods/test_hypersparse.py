import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.errors import PlanError
from fxsparse.method import Held
from fxsparse.methods import hypersparse
from fxsparse.methods.hypersparse import BEND, Sorting, hypersparse_gradient


def test_the_gradient_is_the_papers():
    """kappa 0.6 of five weights keeps two, so that s = 0.6585 / 4."""
    weight = torch.tensor([1.0, -2, 3, -4, 5])
    expected = torch.tensor([1.096343, -1.012536, 0.890798, -0.750865, 0.610452])
    torch.testing.assert_close(hypersparse_gradient([weight], 2)[0], expected, atol=2e-6, rtol=0)
    parts = hypersparse_gradient([weight[:2].view(1, 2), weight[2:]], 2)
    torch.testing.assert_close(torch.cat([p.flatten() for p in parts]), expected, atol=2e-6, rtol=0)


def test_it_is_the_gradient_of_the_penalty_as_autograd_has_it():
    """R = (sum |w|) (sum tanh(s |w|)) / (the same, held fixed), less its own value: only tanh is differentiated."""
    weight = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    size = weight.abs()
    s = BEND / size.detach().sort().values[40]
    held = size.sum().detach() / torch.tanh(s * size).sum().detach()
    (expected,) = torch.autograd.grad(held * torch.tanh(s * size).sum(), weight)
    torch.testing.assert_close(hypersparse_gradient([weight.detach()], 10)[0], expected, rtol=1e-5, atol=1e-6)


def test_small_weights_are_pulled_harder_than_large_ones():
    """For Gaussian weights at kappa 0.9: at 0, at the bound and at three times the bound, by its integrals."""
    weight = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    bound = weight.abs().kthvalue(900_000).values
    weight[:3] = torch.stack([1e-6 * bound, bound, 3 * bound])
    found = hypersparse_gradient([weight], 100_000)[0][:3]
    torch.testing.assert_close(found, torch.tensor([1.09488, 0.72990, 0.08109]), atol=3e-3, rtol=0)


def test_ties_zeros_and_nothing_left_give_finite_gradients():
    for weight, kept in ((torch.ones(4), 2), (torch.tensor([0.0, 0, 0, 3]), 2), (torch.ones(2), 0)):
        assert hypersparse_gradient([weight], kept)[0].isfinite().all()
    assert not hypersparse_gradient([torch.tensor([0.0, 0, 1e-30, 3])], 3)[0][3]
    assert not hypersparse_gradient([torch.tensor([0.0, 0, 0, 3])], 2)[0].any()


def test_the_penalty_grows_by_epochs_between_its_start_and_the_cut():
    weight = torch.tensor([1.0, -2, 3, -4, 5])
    held = Held("w", weight, torch.ones(5, dtype=torch.bool), {}, final=2)
    dense = Held("d", torch.ones(3), torch.ones(3, dtype=torch.bool), {}, final=3)
    penalty = Sorting(0.5, 2.0, epoch=10, start=20, cut=45)
    base = hypersparse_gradient([weight], 2)[0]
    for step, factor in ((20, 0.5), (29, 0.5), (30, 1.0), (44, 2.0)):
        found = penalty([held, dense], step)
        torch.testing.assert_close(found[0]["weight"], factor * base)
        assert found[1] == {}
    for step in (0, 19, 45, 100):
        assert penalty([held, dense], step) == [{}, {}]


def test_a_run_is_dense_then_pulled_then_cut_once_for_all_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    method = hypersparse(cut=12, start=4, epoch=2, strength=0.02, growth=1.2)
    plan = Plan(sparsity=0.9, method=method, overrides=(Override("4", sparsity=0),))
    sparse = fxsparse.compile(model, plan)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    sparse.attach(optimizer)
    first, norms = None, []
    for at in range(1, 16):
        before = torch.cat([sparse.get_parameter(f"{n}.weight").detach().flatten() for n in "02"])
        optimizer.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at))
        (sparse(x) - 1).square().mean().backward()
        optimizer.step()
        norms.append(sparse.penalty_norm is not None)
        masks = torch.cat([sparse.masks()[f"{n}.weight"].flatten() for n in "02"])
        assert sparse.masks()["4.weight"].all()
        assert int(masks.sum()) == (960 if at < 12 else 96)
        if at == 12:
            first = masks
            assert before[masks].abs().min() > 0.5 * before[~masks].abs().max()
            state = optimizer.state[sparse.get_parameter("0.weight")]["momentum_buffer"]
            assert not state.any()
        if at > 12:
            assert torch.equal(masks, first)
    assert norms == [False] * 4 + [True] * 8 + [False] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1}, "strength as a number >= 0, got -1"),
        ({"growth": 0.5}, "growth as a number >= 1, got 0.5"),
        ({"epoch": 0}, "epoch as a number of optimizer steps, at least 1, got 0"),
        ({"cut": 100, "start": 100}, "the cut after the start of the penalty, got 100 and 100"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        hypersparse(**options)
