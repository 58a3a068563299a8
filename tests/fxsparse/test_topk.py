import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import NumericsError
from fxsparse.topk import soft_topk, top_mask, top_of_all, top_of_tiles, top_positions


def by_sorting(scores, n):
    """The definition: order by (score descending, flat index ascending), take n, never -inf."""
    flat = scores.flatten().tolist()
    order = sorted((i for i, s in enumerate(flat) if s != float("-inf")), key=lambda i: (-flat[i], i))
    return sorted(order[: max(n, 0)])


few_values = st.sampled_from([float("-inf"), -1.0, -0.0, 0.0, 0.5, 1.0, float("inf")])


@given(st.lists(few_values, max_size=40), st.integers(0, 45))
def test_equals_sorting_with_ties_and_infinities(values, n):
    scores = torch.tensor(values)
    assert top_positions(scores, n).tolist() == by_sorting(scores, n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 4, 8, 9, 50])
def test_slices_along_a_dimension_equal_sorting_each(dtype, columns):
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randint(0, 6, (7, columns, 3), generator=generator).to(dtype)
    for n in (0, 1, columns // 2, columns):
        mask = top_mask(scores, n, dim=1)
        for row in range(7):
            for last in range(3):
                chosen = mask[row, :, last].nonzero().squeeze(1).tolist()
                assert chosen == by_sorting(scores[row, :, last], n)


def test_equal_scores_choose_the_lowest_indices():
    assert top_positions(torch.zeros(3, 5), 4).tolist() == [0, 1, 2, 3]


def test_minus_infinity_is_never_chosen():
    for n in (2, 3):
        assert top_positions(torch.tensor([-torch.inf, 3.0, -torch.inf]), n).tolist() == [1]
        assert top_of_tiles([(0, torch.tensor([-torch.inf, 3.0, -torch.inf]))], n).tolist() == [1]
    assert top_mask(torch.tensor([[-torch.inf, 3.0]] * 2), 2, dim=1).tolist() == [[False, True]] * 2


@given(
    st.lists(few_values, min_size=1, max_size=60),
    st.integers(0, 60),
    st.integers(1, 60),
)
def test_tiles_equal_the_whole(values, n, height):
    scores = torch.tensor(values)
    tiles = [(i, scores[i : i + height]) for i in range(0, len(scores), height)]
    assert top_of_tiles(tiles, n).tolist() == top_positions(scores, n).tolist()


def test_no_tiles_choose_nothing():
    assert top_of_tiles([], 3).tolist() == []


@settings(max_examples=20)
@given(st.integers(0, 8))
def test_nan_is_refused_by_count_and_place(n):
    scores = torch.tensor([1.0, 2.0, torch.nan, 0.0, torch.nan])
    with pytest.raises(NumericsError, match="2 NaN among 5, the first at flat position 2"):
        top_mask(scores, n)
    with pytest.raises(NumericsError, match="2 NaN among 5"):
        top_of_tiles([(0, torch.ones(5)), (5, scores)], n)


def test_scores_that_require_grad_are_read_only():
    scores = torch.rand(20, requires_grad=True)
    assert not top_mask(scores, 3).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gpu_chooses_what_the_cpu_chooses(dtype):
    scores = torch.randint(0, 50, (64, 96), generator=torch.Generator().manual_seed(0)).to(dtype)
    for n, dim in ((1000, None), (10, 1), (3, 0)):
        assert torch.equal(top_mask(scores.cuda(), n, dim).cpu(), top_mask(scores, n, dim))
    tiles = [(row * 96, scores[row : row + 7].cuda()) for row in range(0, 64, 7)]
    assert torch.equal(top_of_tiles(tiles, 1000).cpu(), top_positions(scores, 1000))


def test_a_large_selection_equals_a_stable_sort():
    scores = torch.rand(300_000).mul(1000).floor()
    expected = scores.sort(descending=True, stable=True).indices[:30_000].sort().values
    assert torch.equal(top_positions(scores, 30_000), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"costs": 0.0}, "finite costs above 0, got some from 0 to 0"),
        ({"costs": torch.tensor([1.0, -2.0, 1.0, 1.0])}, "finite costs above 0, got some from -2 to 1"),
        ({"costs": float("nan")}, "finite costs above 0, got some from nan"),
        ({"costs": torch.ones(3)}, r"costs that broadcast to \[4\], got shape \[3\]"),
        ({"costs": torch.ones(2, 4)}, r"costs that broadcast to \[4\], got shape \[2, 4\]"),
        ({"k": float("nan")}, "k as one number >= 0, got nan"),
        ({"k": -1.0}, "k as one number >= 0, got -1"),
        ({"k": torch.ones(2)}, r"k as one number >= 0, got a tensor of shape \[2\]"),
        ({"beta": -3.0}, "beta as one number >= 0, finite, got -3"),
        ({"beta": float("inf")}, "beta as one number >= 0, finite, got inf"),
        ({"values": torch.tensor([1.0, torch.nan, 0.0, 2.0]), "k": 0.0}, "finite values, got some from nan"),
        ({"values": torch.tensor([1.0, torch.inf, 0.0, 2.0])}, "finite values, got some from 0 to inf"),
    ],
)
def test_arguments_of_the_soft_topk_are_checked(wrong, message):
    right = {"values": torch.tensor([1.0, 3.0, 0.0, 2.0]), "k": 2.0}
    assert float(soft_topk(**right).sum()) == pytest.approx(2)
    with pytest.raises(NumericsError, match=message):
        soft_topk(**(right | wrong))


def test_the_soft_topk_takes_costs_of_any_shape_that_broadcasts_and_ends_of_the_budget():
    values = torch.rand(3, 4)
    for costs in (
        None,
        2.0,
        torch.tensor(2.0),
        torch.rand(4) + 1,
        torch.rand(3, 1) + 1,
        torch.rand(1, 3, 4)[0] + 1,
    ):
        each = torch.as_tensor(1.0 if costs is None else costs).expand(3, 4)
        assert float((each * soft_topk(values, 5.0, costs)).sum()) == pytest.approx(5, rel=1e-5)
        assert not bool(soft_topk(values, 0, costs).any())
        assert bool((soft_topk(values, torch.inf, costs) == 1).all())
    assert torch.allclose(soft_topk(values, 3, beta=0.0), torch.full((3, 4), 0.25))


@pytest.mark.parametrize("size", [3, 8, 9, 40])
def test_counts_beyond_the_slices_choose_all_or_nothing(size):
    scores = torch.randn(4, size)
    assert top_mask(scores, 256, 1).all()
    assert not top_mask(scores, 0, 1).any()


def test_the_largest_of_all_tensors_are_found_together():
    a, b = torch.tensor([[1.0, 5.0], [3.0, -torch.inf]]), torch.tensor([3.0, 4.0, 3.0])
    found = top_of_all([a, b], 4)
    assert [mask.tolist() for mask in found] == [[[False, True], [True, False]], [True, True, False]]
    assert sum(int(mask.sum()) for mask in top_of_all([a, b], 7)) == 6
