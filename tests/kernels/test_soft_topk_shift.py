import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.errors import NumericsError
from fxsparse.kernels.soft_topk import shift
from fxsparse.topk import sinkhorn_topk, soft_topk, top_mask

D = 20_000


def weights(n: int = D, dtype=torch.float64) -> Tensor:
    return (0.05 * torch.randn(n, dtype=dtype)).abs()


def prices(n: int) -> Tensor:
    return 10 ** (4 * torch.rand(n, dtype=torch.float64))


@given(
    st.integers(2, 300),
    st.floats(0.01, 0.99),
    st.sampled_from([0.1, 10.0, 1e3, 1e6]),
    st.booleans(),
    st.integers(0, 9),
)
def test_the_mask_costs_exactly_the_budget(n, share, beta, costed, seed):
    torch.manual_seed(seed)
    costs = prices(n) if costed else torch.ones(n, dtype=torch.float64)
    k = share * float(costs.sum())
    mask = soft_topk(weights(n), k, costs, beta)
    assert float((costs * mask).sum()) == pytest.approx(k, rel=1e-10)
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1


@pytest.mark.parametrize("beta", [10, 20, 100, 1000])
@pytest.mark.parametrize("costed", [False, True])
def test_it_is_what_sinkhorn_converges_to(beta, costed):
    values, costs = weights(2_000), prices(2_000) if costed else torch.ones(2_000, dtype=torch.float64)
    k = 0.1 * float(costs.sum())
    expected = sinkhorn_topk(values, k, costs, beta, iterations=3_000)
    torch.testing.assert_close(soft_topk(values, k, costs, beta), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("beta", "iterations"), [(10, 18), (20, 20), (100, 68), (1000, 657)])
def test_sinkhorn_takes_as_many_iterations_as_its_contraction_law_says(beta, iterations):
    # Its error shrinks by rho = sum of c m^2 / k an iteration: 12, 14, 58 and 656 to 1e-12 by the law alone.
    values, k = weights(), 0.1 * D
    exact = soft_topk(values, k, beta=beta)

    def error(count: int) -> float:
        return float((sinkhorn_topk(values, k, beta=beta, iterations=count) - exact).abs().max())

    assert error(iterations) < 1e-9
    rho = float((exact**2).sum() / k)
    assert error(iterations // 2 + 2) / error(iterations // 2) == pytest.approx(rho**2, rel=0.05)


@pytest.mark.parametrize("costed", [False, True])
@pytest.mark.parametrize("beta", [1.0, 20.0, 200.0])
def test_the_gradient_is_that_of_finite_differences(beta, costed):
    torch.manual_seed(1)
    values, upstream = weights(40).requires_grad_(), torch.randn(40, dtype=torch.float64)
    costs = 1 + 3 * torch.rand(40, dtype=torch.float64) if costed else None
    k = 0.3 * (40 if costs is None else float(costs.sum()))

    def loss(v: Tensor) -> Tensor:
        return (soft_topk(v, k, costs, beta) * upstream).sum()

    (gradient,) = torch.autograd.grad(loss(values), values)
    step = 1e-5
    with torch.no_grad():
        numeric = torch.stack(
            [
                (loss(values + e) - loss(values - e)) / (2 * step)
                for e in step * torch.eye(40, dtype=torch.float64)
            ]
        )
    assert float((gradient - numeric).abs().max()) < 1e-8 * max(1, beta**3 / 1e3)


def test_no_change_of_the_values_changes_the_cost():
    values, costs = weights(500).requires_grad_(), prices(500)
    mask = soft_topk(values, 0.2 * float(costs.sum()), costs)
    (moved,) = torch.autograd.grad((costs * mask).sum(), values, retain_graph=True)
    (single,) = torch.autograd.grad(costs[0] * mask[0], values)
    assert float(moved.abs().max()) < 1e-9 * float(single.abs().max())


def test_sharp_masks_are_hard_ones_and_flat_ones_the_mean():
    values = weights(1_000)
    hard = top_mask(values, 100)
    assert float((soft_topk(values, 100, beta=1e7) - hard.double()).abs().max()) < 0.5
    torch.testing.assert_close(soft_topk(values, 100, beta=1e-9), torch.full_like(values, 0.1))


@pytest.mark.parametrize(("beta", "kept"), [(10, 0.17), (20, 0.26), (100, 0.73), (1000, 0.97)])
def test_masks_of_initial_weights_are_far_from_binary(beta, kept):
    """The mean over the kept entries at the paper's sharpness, over 20 draws of 20,000 weights."""
    masks = torch.stack([soft_topk(weights(), 0.1 * D, beta=beta) for _ in range(20)])
    assert float(masks.topk(D // 10, 1).values.mean()) == pytest.approx(kept, abs=0.005)


def test_a_budget_of_nothing_or_of_everything_is_exact_and_has_no_gradient():
    values = weights(10).requires_grad_()
    for k, share in ((0, 0.0), (10, 1.0), (11.5, 1.0)):
        mask = soft_topk(values, k)
        assert torch.equal(mask, torch.full((10,), share, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(mask.sum(), values)
        assert torch.equal(gradient, torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [10.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("costed", [False, True])
def test_newton_ends_after_a_few_passes(dtype, beta, costed, monkeypatch):
    passes, evaluate = [], shift._evaluate
    monkeypatch.setattr(shift, "_evaluate", lambda *call: passes.append(call) or evaluate(*call))
    values, costs = weights(200_000, dtype), prices(200_000).to(dtype) if costed else None
    k = 0.1 * (200_000 if costs is None else float(costs.double().sum()))
    mask = soft_topk(values, k, costs, beta).double()
    assert len(passes) <= 7
    assert float((mask if costs is None else costs.double() * mask).sum()) == pytest.approx(k, rel=2e-6)


def test_ties_and_equal_values_share_the_budget():
    torch.testing.assert_close(soft_topk(torch.ones(8), 2.0, beta=1e4), torch.full((8,), 0.25))
    assert soft_topk(torch.zeros(0), 0.0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    values = weights(5_000).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        mask = soft_topk(values, 500.0)
    assert mask.dtype == torch.float32
    torch.testing.assert_close(mask.double(), soft_topk(values.double(), 500.0), rtol=2e-5, atol=1e-7)
    assert float(mask.double().sum()) == pytest.approx(500, rel=1e-5)


def test_costs_to_ten_thousand_and_many_values_stay_exact():
    values, costs = weights(1_000_000, torch.float32), prices(1_000_000).float()
    k = 0.05 * float(costs.double().sum())
    assert float((costs.double() * soft_topk(values, k, costs).double()).sum()) == pytest.approx(k, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "costs"),
    [
        ([1.0, math.nan], [1.0, 1.0]),
        ([1.0, math.inf], [1.0, 1.0]),
        ([1.0, 2.0], [1.0, 0.0]),
        ([1.0, 2.0], [3.0, -1.0]),
    ],
)
def test_what_is_not_finite_or_costs_nothing_is_refused(values, costs):
    numbers = (torch.tensor(n, dtype=torch.float64) for n in (0.5, 20.0))
    with pytest.raises(NumericsError, match="finite values and finite costs above 0"):
        torch.ops.fxsparse.soft_topk_shift([torch.tensor(values)], [torch.tensor(costs)], *numbers)


def test_it_compiles_in_one_graph_with_its_gradient():
    values = weights(256, torch.float32).requires_grad_()

    def step(v: Tensor, k: Tensor, beta: Tensor) -> Tensor:
        return (soft_topk(v, k, None, beta) * v).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for k, beta in ((30.0, 5.0), (60.0, 20.0)):
        numbers = torch.tensor(k, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)
        (expected,) = torch.autograd.grad(step(values, *numbers), values)
        (got,) = torch.autograd.grad(compiled(values, *numbers), values)
        torch.testing.assert_close(got, expected)


def test_the_op_keeps_the_rules_of_custom_ops():
    values = [weights(20).requires_grad_(), weights(6).view(2, 3).requires_grad_()]
    costs = [torch.ones(1, dtype=torch.float64), 1 + torch.rand(2, 3, dtype=torch.float64)]
    numbers = torch.tensor(5.0, dtype=torch.float64), torch.tensor(20.0, dtype=torch.float64)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.fxsparse.soft_topk_shift.default
    assert set(torch.library.opcheck(op, (values, costs, *numbers), test_utils=checks).values()) == {
        "SUCCESS"
    }


def test_a_mask_that_is_hard_in_float32_has_no_gradient_and_no_nan():
    for beta in (1e5, 1e12, 1e30):
        values = (torch.arange(24.0) / 24).requires_grad_()
        mask = soft_topk(values, 6, beta=beta)
        mask.square().sum().backward()
        assert mask.tolist() == [0] * 18 + [1] * 6
        assert values.grad.tolist() == [0] * 24
