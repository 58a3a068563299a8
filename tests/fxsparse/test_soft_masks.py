import pytest
import torch
from torch import Tensor

from fxsparse.soft_masks import (
    BETA,
    FROZEN,
    SHIFT,
    averaged_mask,
    gather,
    shared_shift,
    soft_mask,
    spread,
)
from fxsparse.topk import soft_topk

BETA_NOW, BUDGET = 12.0, 30.0


def two_weights() -> list[Tensor]:
    shapes = ((6, 8), (4, 6, 2))
    return [(0.3 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]


def numbers_for(weights: list[Tensor], block: tuple[int, int], frozen: float = 0.0) -> tuple[Tensor, float]:
    """The numbers of a budget of BUDGET entries, and the cost of a block."""
    cost = float(block[0] * block[1])
    values = [gather(w.detach().abs(), block) for w in weights]
    costs = [v.new_full((1,), cost) for v in values]
    budget, beta = (torch.tensor(n, dtype=torch.float64) for n in (BUDGET, BETA_NOW))
    numbers = torch.zeros(3, dtype=torch.float64)
    numbers[SHIFT] = torch.ops.fxsparse.soft_topk_shift(values, costs, budget, beta)
    numbers[BETA], numbers[FROZEN] = BETA_NOW, frozen
    return numbers, cost


def masks_of(weights: list[Tensor], block: tuple[int, int]) -> list[Tensor]:
    """The soft masks of both weights together, by the soft top-k of one long vector, differentiable."""
    values = [gather(w.abs(), block) for w in weights]
    joined = torch.cat([v.flatten() for v in values])
    mask = soft_topk(joined, BUDGET, costs=torch.tensor(float(block[0] * block[1])), beta=BETA_NOW)
    parts = mask.split([v.numel() for v in values])
    return [spread(m.view(v.shape), block, w.shape) for m, v, w in zip(parts, values, weights, strict=True)]


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_gradients_are_those_of_weight_times_soft_topk_over_both_weights(block):
    weights = two_weights()
    upstream = [torch.randn_like(w) for w in weights]
    numbers, cost = numbers_for(weights, block)
    soft = masks_of(weights, block)
    keep = [(s > s.median()).double() for s in soft]
    # The cut to the kept entries is straight through: forward has it, backward does not.
    expected = torch.autograd.grad(
        sum((w * s * g).sum() for w, s, g in zip(weights, soft, upstream, strict=True)), weights
    )
    shift = shared_shift(numbers, weights, [block] * 2, [cost] * 2)
    effective = [
        soft_mask(w, k > 0, s.detach(), numbers, shift, block, cost)
        for w, s, k in zip(weights, soft, keep, strict=True)
    ]
    for got, w, s, k in zip(effective, weights, soft, keep, strict=True):
        torch.testing.assert_close(got, w * s * k)
    got = torch.autograd.grad(sum((e * g).sum() for e, g in zip(effective, upstream, strict=True)), weights)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_frozen_mask_lets_kept_weights_learn_and_nothing_else():
    weights = two_weights()
    numbers, cost = numbers_for(weights, (1, 1), frozen=1.0)
    soft = [(s * (s > 0.4)).detach() for s in masks_of(weights, (1, 1))]
    shift = shared_shift(numbers, weights, [(1, 1)] * 2, [cost] * 2)
    effective = [
        soft_mask(w, s > 0, s, numbers, shift, (1, 1), cost) for w, s in zip(weights, soft, strict=True)
    ]
    got = torch.autograd.grad(sum(e.sum() for e in effective), weights)
    for gradient, s in zip(got, soft, strict=True):
        assert torch.equal(gradient, s)


def test_a_weight_of_exactly_zero_gets_no_gradient_through_its_magnitude():
    weight = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    numbers = torch.tensor([-1.0, 2.0, 0.0], dtype=torch.float64)
    shift = shared_shift(numbers, [weight], [(1, 1)], [1.0])
    (gradient,) = torch.autograd.grad(
        (soft_mask(weight, torch.ones(1, 2) > 0, torch.ones_like(weight), numbers, shift) * 3).sum(), weight
    )
    assert float(gradient[0, 0]) == pytest.approx(
        3 * float(torch.sigmoid(torch.tensor(-1.0, dtype=torch.float64)))
    )


def test_before_the_first_step_everything_is_kept_and_finite():
    weights = [w.float().detach().requires_grad_() for w in two_weights()]
    for start in ([torch.inf, 1.0, 0.0], [0.0, 0.0, 0.0]):
        numbers = torch.tensor(start, dtype=torch.float64)
        shift = shared_shift(numbers, weights, [(1, 1)] * 2, [1.0] * 2)
        effective = [soft_mask(w, w == w, torch.ones_like(w), numbers, shift) for w in weights]
        for gradient in torch.autograd.grad(sum(e.sum() for e in effective), weights):
            assert torch.equal(gradient, torch.ones_like(gradient))


def test_a_soft_mask_counts_within_the_mask_alone():
    weight, mask = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])
    numbers, soft = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64), torch.full((3,), 0.5)
    assert soft_mask(weight, mask, soft, numbers, torch.zeros(())).tolist() == [0.5, 0.0, 1.5]


def test_dual_averaging_trains_dropped_entries_until_it_is_frozen():
    weight, mask = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.tensor([True, False, True])
    for frozen, expected in ((0.0, [1.0, 1.0, 1.0]), (1.0, [1.0, 0.0, 1.0])):
        effective = averaged_mask(weight, mask, torch.tensor([0.0, 0.0, frozen], dtype=torch.float64))
        assert effective.tolist() == [1.0, 0.0, 3.0]
        (gradient,) = torch.autograd.grad(effective.sum(), weight)
        assert gradient.tolist() == expected
