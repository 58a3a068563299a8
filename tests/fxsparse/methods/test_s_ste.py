import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PatternError, PlanError, UnsupportedError
from fxsparse.methods import s_ste
from fxsparse.methods.s_ste import Beta, s_ste_map, soft24
from fxsparse.pattern import NM

ROWS = torch.tensor([[0.9, -0.4, 0.1, -1.2], [0.3, 0.3, -0.2, 0.05]], dtype=torch.float64)
MASK = NM(2, 4).project(ROWS.abs(), 4)


def test_values_and_the_scale_worked_out_beforehand():
    expected = torch.tensor([[0.5, 0, 0, -0.8], [0.1, 0.1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(soft24(ROWS), expected)
    beta = Beta()(ROWS, MASK, torch.Generator())
    assert float(beta) == pytest.approx(1.6153846153846152, rel=1e-7)
    assert not expected[~MASK].any()
    assert float(Beta()(torch.zeros(2, 4), MASK, torch.Generator())) == 1.0
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    mask = NM(2, 4).project(weight.abs(), 0)
    assert float(Beta()(weight, mask, torch.Generator())) == pytest.approx(1.4837, abs=5e-3)


def test_a_swap_of_nearly_equal_weights_moves_the_output_by_their_difference_alone():
    near = torch.tensor([[1.0, 0.5, 0.5 + 1e-7, 0.1], [1.0, 0.5 + 1e-7, 0.5, 0.1]], dtype=torch.float64)
    soft = soft24(near)
    assert float((soft[0] - soft[1]).abs().max()) < 1.1e-7
    hard = near * NM(2, 4).project(near.abs(), 4)
    assert float((hard[0] - hard[1]).abs().max()) > 0.4


def test_ties_leave_fewer_than_two():
    assert soft24(torch.ones(1, 4)).tolist() == [[0, 0, 0, 0]]
    assert soft24(torch.tensor([[2.0, 1, 1, 1]])).tolist() == [[1, 0, 0, 0]]


def test_the_gradient_is_straight_through():
    weight = ROWS.clone().requires_grad_()
    upstream = torch.arange(8, dtype=torch.float64).view(2, 4)
    s_ste_map(weight, MASK, torch.tensor(1.5)).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_a_convolution_has_groups_of_channels_at_each_kernel_position():
    weight = torch.randn(3, 8, 2, 2)
    soft = soft24(weight)
    assert torch.equal(soft[:, :, 1, 0], soft24(weight[:, :, 1, 0]))


def build(mvue=False, width=16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 8))
    return fxsparse.compile(model, Plan(method=s_ste(mvue=mvue)))


def test_beta_is_frozen_and_folded_with_the_values():
    sparse = build()
    beta = sparse.get_buffer("0.weight_beta").clone()
    start = sparse.get_parameter("0.weight").detach().clone()
    assert torch.equal(beta, Beta()(start, sparse.masks()["0.weight"], torch.Generator()))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        (sparse(torch.randn(12, 16)) - 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(sparse.get_buffer("0.weight_beta"), beta)
    weight = sparse.get_parameter("0.weight").detach()
    assert torch.equal(sparse.dense_state_dict()["0.weight"], beta * soft24(weight))
    NM(2, 4).check(sparse.dense_state_dict()["0.weight"] != 0)


def gradients(sparse, x, call=None):
    x = x.clone().requires_grad_()
    sparse.zero_grad()
    (sparse(x) if call is None else call(x)).square().sum().backward()
    return [
        sparse.get_parameter(f"{i}.{kind}").grad.clone() for i in (0, 2) for kind in ("weight", "bias")
    ] + [x.grad]


def test_mvue_thins_the_weight_gradient_alone_with_the_numbers_of_the_step():
    x = torch.randn(2, 3, 16)
    plain, sparse = gradients(build(), x), build(mvue=True)
    found = gradients(sparse, x)
    for place, (a, b) in enumerate(zip(plain, found, strict=True)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5) == (place not in (0, 2))
    again = gradients(sparse, x, lambda x: checkpoint(sparse, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    draws = []
    for step in range(300):
        sparse.get_buffer("fxsparse_step").fill_(step)
        draws.append(gradients(sparse, x)[2])
    spread = torch.stack(draws).std(0) / 300**0.5
    off = (torch.stack(draws).mean(0) - plain[2]).abs()
    assert bool((off <= 5 * spread + 1e-5).all())
    assert not torch.equal(draws[0], draws[1])


def test_mvue_trains_under_autocast():
    sparse = build(mvue=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sparse(torch.randn(6, 16)).float().square().mean()
    loss.backward()
    assert sparse.get_parameter("0.weight").grad.dtype == torch.float32


def test_bad_options_patterns_and_layouts_are_named():
    with pytest.raises(PlanError, match="expected mvue as True or False, got 1"):
        s_ste(mvue=1)
    for pattern in (NM(1, 4), NM(2, 8)):
        with pytest.raises(PlanError, match="expected masks with 2 of every 4 input channels"):
            fxsparse.compile(nn.Linear(16, 8), Plan(method=s_ste(), pattern=pattern))
    dense = Plan(method=s_ste(), overrides=(fxsparse.Override("weight", sparsity=0),))
    with pytest.raises(PlanError, match="exclude= keeps a weight dense"):
        fxsparse.compile(nn.Linear(16, 8), dense)
    with pytest.raises(
        PatternError, match=r"in_features=3; .* Exclude this weight, or, where the method trains any"
    ):
        fxsparse.compile(nn.Conv2d(3, 8, 3), Plan(method=s_ste()))
    from transformers.pytorch_utils import Conv1D

    with pytest.raises(UnsupportedError, match=r"stored \[in, out\], and s_ste computes with rows"):
        fxsparse.compile(Conv1D(8, 16), Plan(method=s_ste()))
