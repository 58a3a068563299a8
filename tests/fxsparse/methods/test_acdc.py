import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.flops.training import train_flops
from fxsparse.methods import acdc


def test_the_presets_phases_are_the_papers_half_dense_and_half_sparse():
    """Epochs of the ResNet-50 preset: compress at 10, 20, ..., 70 and 85, decompress at 15, 25, ..., 75."""
    schedule = acdc(steps=100).schedule
    levels = dict(schedule.ramp.table)
    assert [step for step, level in levels.items() if level is None] == [10, 20, 30, 40, 50, 60, 70, 85]
    assert [step for step, level in levels.items() if level == 0] == [15, 25, 35, 45, 55, 65, 75]
    assert schedule.updates(1000) == schedule.at
    sparse = [step for step in range(100) if acdc(steps=100).nnz(step, 10, 100) == 10]
    assert len(sparse) == 50


@pytest.mark.parametrize("steps", [37, 100, 1234])
def test_the_last_phase_is_sparse_whatever_the_number_of_steps(steps):
    method = acdc(steps=steps)
    assert method.nnz(steps - 1, 7, 100) == 7
    assert method.nnz(0, 7, 100) == 100


def test_training_flops_are_weighted_by_phase():
    found = train_flops(acdc(steps=100), lambda counts: 10 * counts["w"], {"w": 20}, {"w": 100})
    assert found == pytest.approx(3 * (0.5 * 1000 + 0.5 * 200))


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    method = acdc(steps=20, compress=(0.2, 0.8), decompress=(0.5,))
    sparse = fxsparse.compile(model, Plan(sparsity=0.9, method=method))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    sparse.attach(optimizer)
    return sparse, optimizer


def test_a_cut_is_global_and_exact_rests_within_a_phase_and_what_comes_back_is_zero():
    sparse, optimizer = build()
    names = [name for name, _ in sparse.weights()]
    before = {}
    for at in range(1, 21):
        weights = torch.cat([sparse.get_parameter(name).detach().flatten() for name in names])
        optimizer.zero_grad()
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at))
        (sparse(x) - 1).square().mean().backward()
        optimizer.step()
        masks = sparse.masks()
        count = sum(int(mask.sum()) for mask in masks.values())
        after = torch.cat([sparse.get_parameter(name).detach().flatten() for name in names])
        kept = torch.cat([mask.flatten() for mask in masks.values()])
        assert count == (57 if 4 <= at < 10 or at >= 16 else 576)
        if at in (4, 16):
            assert after[kept].abs().min() > weights[~kept].abs().min()
            assert not after[~kept].any()
        elif before:
            assert at == 10 or all(torch.equal(masks[name], before[name]) for name in names)
        if at == 10:
            gone = torch.cat([before[name].flatten() for name in names]).logical_not()
            assert not after[gone].any()
            assert all(not optimizer.state[sparse.get_parameter(n)]["momentum_buffer"].any() for n in names)
        if at == 12:
            assert after[gone].count_nonzero() > 0.8 * int(gone.sum())  # dead neurons learn nothing
        before = masks


def test_adam_starts_anew_at_a_decompression_and_moves_no_further_than_in_its_first_step():
    sparse, _ = build()
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer)
    names, moved = [name for name, _ in sparse.weights()], {}
    for at in range(1, 13):
        before = {name: sparse.get_parameter(name).detach().clone() for name in names}
        optimizer.zero_grad()
        (sparse(torch.ones(4, 16)) - 1).square().mean().backward()
        optimizer.step()
        moved[at] = max(
            float((sparse.get_parameter(n) - old).detach().abs().max()) for n, old in before.items()
        )
    assert moved[11] == pytest.approx(0.01, rel=1e-3), "the decompression follows step 10"
    assert all(optimizer.state[sparse.get_parameter(name)]["step"] == 2 for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps as a number of optimizer steps, at least 2, got 1"),
        ({"compress": (0.1, 1.5)}, "compress as shares of the steps between 0 and 1"),
        ({"compress": (0.1,), "decompress": (0.5,)}, "phases that alternate, a compression first and last"),
        ({"steps": 5}, "phases that alternate"),
        ({"compress": (), "decompress": ()}, r"compress=\[\] and decompress=\[\]"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        acdc(**options)


def test_weights_share_one_budget():
    with pytest.raises(PlanError, match="all weights of acdc share one budget"):
        Plan(sparsity=0.9, method=acdc(), overrides=(fxsparse.Override("0", sparsity=0.5),))
