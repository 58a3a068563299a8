import pytest
import torch

from fxsparse.errors import NumericsError, PlanError
from fxsparse.methods import wanda
from fxsparse.pattern import NM, Block, ConstantFanIn, Unstructured
from fxsparse.reconstruction import reconstruct

PATTERNS = [Unstructured(), NM(2, 4), NM(1, 4), Block(2, 4), ConstantFanIn()]


def correlated(rows=8, columns=48, seed=0):
    """A weight and H of inputs that depend on each other, float64."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    inputs = torch.randn(400, columns, generator=draw, dtype=torch.float64) @ (
        mixing + 3 * torch.eye(columns)
    )
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64), 2 * inputs.T @ inputs / 400


def cost(change, hessian):
    return ((change @ hessian) * change).sum(1) / 2


def test_the_golden_vector():
    hessian = 2 * torch.eye(4) + torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)
    weight = torch.tensor([[1.0, -0.6, 0.5, 0.8]], dtype=torch.float64)
    made = reconstruct(weight, hessian, NM(2, 4), 2, damping=0.0)
    torch.testing.assert_close(made.matrix, torch.tensor([[1.0, 0, 0, 1.05]], dtype=torch.float64))
    torch.testing.assert_close(made.loss, torch.tensor([0.2475], dtype=torch.float64))
    torch.testing.assert_close(made.loss, cost(made.matrix - weight, hessian.double()))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("width", [8, 20, 128])
def test_the_loss_is_what_the_change_costs_and_the_count_is_exact(pattern, width):
    weight, hessian = correlated()
    nnz = pattern.feasible(weight.shape, 190)
    made = reconstruct(weight, hessian, pattern, nnz, damping=0.0, width=width)
    torch.testing.assert_close(made.loss, cost(made.matrix - weight, hessian), rtol=1e-10, atol=0)
    assert int((made.matrix != 0).sum()) == nnz
    pattern.check(made.matrix != 0)


def test_the_order_of_updates_of_blocks_of_columns_changes_nothing():
    weight, hessian = correlated()
    one, other = (reconstruct(weight, hessian, NM(2, 4), 0, width=width).matrix for width in (4, 128))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", [ConstantFanIn(), NM(2, 4)], ids=str)
def test_with_a_diagonal_h_kept_weights_stay_and_the_choice_is_wandas(pattern):
    weight, _ = correlated()
    squares = torch.rand(48, generator=torch.Generator().manual_seed(1)).double() + 0.1
    made = reconstruct(weight, torch.diag(2 * squares), pattern, 192)
    assert torch.equal(made.matrix, wanda().one_shot(weight, squares, pattern, 192)[0])


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_making_up_for_what_goes_beats_the_same_mask_and_loses_to_least_squares(pattern):
    weight, hessian = correlated()
    made = reconstruct(weight, hessian, pattern, 192, damping=0.0)
    kept = made.matrix != 0
    best = weight.clone()
    for row, mask in enumerate(kept):  # the minimum of d H d' over the kept entries, row by row
        inner, moved = hessian[mask][:, mask], hessian[mask][:, ~mask] @ weight[row, ~mask]
        best[row, mask] += torch.linalg.solve(inner, moved)
    best = torch.where(kept, best, 0)
    least, left = (cost(w - weight, hessian).sum() for w in (best, torch.where(kept, weight, 0)))
    assert least <= made.loss.sum() < 0.9 * left


def test_columns_that_saw_zeros_only_go_first_and_kept_ones_keep_their_values():
    weight, hessian = correlated(columns=8)
    hessian[[1, 5]] = hessian[:, [1, 5]] = 0
    some = reconstruct(weight, hessian, ConstantFanIn(), 48).matrix
    assert (some[:, [1, 5]] == 0).all()
    most = reconstruct(weight, hessian, ConstantFanIn(), 56).matrix
    assert int((most != 0).sum()) == 56
    assert torch.equal(most[:, 5], torch.zeros(8))
    assert torch.equal(most[:, 1], weight[:, 1])
    assert torch.equal(reconstruct(weight, hessian * 0, NM(2, 4), 0).matrix[:, :2], weight[:, :2])


def test_damping_is_raised_until_h_has_a_factor_and_the_note_says_so():
    weight = torch.randn(2, 4)
    singular = torch.ones(4, 4)
    made = reconstruct(weight, singular, NM(2, 4), 4, damping=0.0)
    assert made.note == "damping raised from 0 to 0.01"
    assert made.matrix.isfinite().all()
    with pytest.raises(NumericsError, match="no Cholesky factor, even with 1 of its mean diagonal"):
        reconstruct(
            weight, singular - 9 * torch.ones(4, 4).triu(1) - 9 * torch.ones(4, 4).tril(-1), NM(2, 4), 4
        )


def test_what_is_not_finite_and_patterns_it_does_not_know_are_refused():
    with pytest.raises(NumericsError, match="expected finite inputs"):
        reconstruct(torch.ones(1, 4), torch.full((4, 4), torch.nan), NM(2, 4), 2)

    class Other:
        pass

    with pytest.raises(
        PlanError, match=r"expected Unstructured, ConstantFanIn, NM or Block, got .*Use wanda\(\)"
    ):
        reconstruct(torch.ones(1, 4), torch.eye(4), Other(), 2)
