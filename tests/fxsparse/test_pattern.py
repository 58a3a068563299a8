from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import NumericsError, PatternError
from fxsparse.pattern import NM, Block, ConstantFanIn, Strided, Unstructured, from_dict, row_tiles, to_dict
from fxsparse.testing import check_pattern
from fxsparse.transposable import Transposable

ALL = [
    Unstructured(),
    ConstantFanIn(),
    ConstantFanIn(3),
    NM(2, 4),
    NM(1, 4),
    NM(3, 12),
    Block(2, 4),
    Block(3, 2),
    Block(1, 1),
    Strided(4),
    Strided(12),
    Strided(1),
]


@pytest.mark.parametrize("pattern", ALL, ids=str)
@pytest.mark.parametrize("shape", [(6, 12), (12, 12), (6, 12, 3), (6, 12, 3, 3)], ids=str)
def test_contract(pattern, shape):
    rows = shape[0]
    for nnz in (0, rows, 5 * rows + 1, 12 * rows):
        check_pattern(pattern, shape, nnz)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([Unstructured(), ConstantFanIn(), NM(2, 4), Block(2, 4), Strided(4)]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_contract_at_any_shape(pattern, rows, columns, kernel, density, seed):
    shape = (2 * rows, 4 * columns, kernel)
    check_pattern(pattern, shape, int(density * 8 * rows * columns * kernel), seed)


@pytest.mark.parametrize(
    ("pattern", "nnz", "expected"),
    [
        (Unstructured(), 37, 37),
        (Unstructured(), 10_000, 96),
        (ConstantFanIn(), 37, 32),  # 37 // 8 = 4 in each of 8 rows
        (ConstantFanIn(), 7, 0),
        (ConstantFanIn(5), 7, 40),
        (NM(2, 4), 7, 48),  # 96 / 4 groups x 2
        (NM(1, 4), 7, 24),
        (Strided(4), 7, 24),  # 96 / 4
        (Block(4, 3), 37, 36),  # 3 blocks of 12
    ],
    ids=str,
)
def test_feasible_counts(pattern, nnz, expected):
    assert pattern.feasible((8, 12), nnz) == expected


def test_constant_fan_in_takes_the_best_of_every_row():
    score = torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0]])
    assert ConstantFanIn().project(score, 2).tolist() == [[True, False, False], [False, True, False]]
    assert Unstructured().project(score, 2).tolist() == [[True, True, False], [False, False, False]]


def test_nm_groups_of_a_convolution_run_along_the_input_channels():
    # [1 out, 4 in, 1, 2]: channels 0..3 score 4,3,2,1 at kernel position 0 and 1,2,3,4 at position 1.
    score = torch.tensor([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]]).view(1, 4, 1, 2)
    mask = NM(2, 4).project(score, 0)
    assert mask.view(4, 2).int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    # Groups over the flattened row (kernel innermost) would give 4,3 of {4,1,3,2} and 3,4 of {2,3,1,4}.


def test_strided_keeps_one_of_the_entries_a_stride_apart():
    # Two groups of four: columns 0, 2, 4, 6 and 1, 3, 5, 7; their largest magnitudes are .8 and .9.
    weight = torch.tensor([[0.1, 0.9, -0.5, 0.2, -0.8, 0.3, 0.4, -0.7]])
    mask = Strided(4).project(weight.abs(), 0)
    assert mask.flatten().nonzero().flatten().tolist() == [1, 4]


def test_strided_groups_of_a_convolution_run_through_the_flattened_row():
    # [1 out, 2 in, 1, 3]: flat entries 0..5, groups {0, 3}, {1, 4}, {2, 5} pair the channels of one kernel position.
    score = torch.tensor([[5.0, 1.0, 4.0], [3.0, 2.0, 6.0]]).view(1, 2, 1, 3)
    assert Strided(2).project(score, 0).flatten().int().tolist() == [1, 0, 0, 0, 1, 1]
    # m = 3 goes across kernel positions: {0, 2, 4} and {1, 3, 5}.
    assert Strided(3).project(score, 0).flatten().int().tolist() == [1, 0, 0, 0, 0, 1]


def test_strided_rows_have_one_fan_in():
    mask = Strided(4).project(torch.rand(6, 8, 3, 3), 0)
    assert mask.flatten(1).sum(1).tolist() == [18] * 6
    ConstantFanIn(18).check(mask)


def test_strided_goes_to_a_plan_file_and_back():
    assert to_dict(Strided(16)) == {"name": "strided", "m": 16}
    assert from_dict(to_dict(Strided(16))) == Strided(16)


def test_block_of_a_convolution_spans_channels_at_one_kernel_position():
    score = torch.zeros(2, 2, 1, 2)
    score[..., 1] = 1.0
    mask = Block(2, 2).project(score, 4)
    assert mask[..., 1].all()
    assert not mask[..., 0].any()


def test_blocks_are_scored_by_their_sum():
    score = torch.tensor([[5.0, 0.0, 3.0, 3.0]])
    assert Block(1, 2).project(score, 2).tolist() == [[False, False, True, True]]


def test_block_ties_go_to_the_lower_flat_index_of_the_weight():
    # [1, 2, 2]: flat indices 0, 1 are channel 0, so both its kernel positions come before channel 1.
    mask = Block(1, 1).project(torch.zeros(1, 2, 2), 2)
    assert mask.flatten().tolist() == [True, True, False, False]


def test_the_largest_finite_scores_do_not_displace_a_forced_block():
    score = torch.full((2, 4), torch.finfo(torch.float32).max)
    score[1, 2:] = torch.inf
    assert Block(1, 2).project(score, 2).tolist() == [[False] * 4, [False, False, True, True]]


def test_blocks_are_pruned_whole_and_those_with_holes_first():
    mask = torch.zeros(4, 4, 2, dtype=torch.bool)  # blocks of 2 x 2 at each of two kernel positions
    mask[:2, :2, 0], mask[2:, 2:, 0], mask[:2, 2:, 1], mask[0, 0, 1] = True, True, True, True
    active = mask.flatten().nonzero().flatten()
    score = torch.zeros(mask.shape)
    score[:2, :2, 0], score[2:, 2:, 0], score[:2, 2:, 1], score[0, 0, 1] = 2.0, 3.0, 1.0, 100.0
    for keep, blocks in ((13, 3), (12, 3), (11, 2), (8, 2), (7, 1), (3, 0)):
        kept = torch.zeros(mask.numel(), dtype=torch.bool)
        kept[active[Block(2, 2).prune(score[mask], active, mask.shape, keep)]] = True
        expected = (score >= 4 - blocks) & mask
        expected[0, 0, 1] = False
        assert torch.equal(kept.view(mask.shape), expected)


def test_prune_ignores_row_quotas():
    score = torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0]])
    for pattern in (ConstantFanIn(), NM(1, 3)):
        kept = pattern.prune(score.flatten(), torch.arange(6), score.shape, 3)
        assert kept.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NM(2, 4).feasible((8, 30), 0), "in_features=30; 2:4 needs a multiple of 4"),
        (lambda: NM(2, 4).project(torch.zeros(8, 3, 3, 3), 0), "in_features=3; 2:4 needs a multiple of 4"),
        (
            lambda: Block(16, 4).feasible((10, 8), 8),
            r"out_features=10; Block\(16, 4\) needs a multiple of 16",
        ),
        (lambda: Block(2, 16).feasible((10, 8), 8), r"in_features=8; Block\(2, 16\) needs a multiple of 16"),
        (lambda: ConstantFanIn(9).feasible((4, 8), 8), "fan-in of at most 8 for shape"),
        (
            lambda: ConstantFanIn().feasible((4,), 8),
            r"at least 2 dimensions, none of them 0, got shape \[4\]",
        ),
        (lambda: NM(1, 2).feasible((0, 8), 8), r"none of them 0, got shape \[0, 8\]"),
        (lambda: Unstructured().feasible((4, 8), -1), "nnz >= 0, got -1"),
        (lambda: NM(5, 4), r"n <= m, got NM\(n=5, m=4\)"),
        (
            lambda: Strided(4).feasible((8, 30), 0),
            r"entries in a row of \[8, 30\]=30; Strided\(4\) needs a multiple of 4",
        ),
        (
            lambda: Strided(4).check(torch.ones(8, 3, 3, 3) > 0),
            r"row of \[8, 3, 3, 3\]=27; Strided\(4\) needs",
        ),
        (lambda: Strided(0), "Strided: expected m as an integer >= 1, got 0"),
        (
            lambda: Strided(2).project(torch.tensor([[1.0, -torch.inf, 1.0, -torch.inf]]), 2),
            r"expected 2 entries for Strided\(m=2\), got only 1",
        ),
        (lambda: NM(0, 4), "NM: expected n as an integer >= 1, got 0"),
        (lambda: Block(2, cast(int, 1.5)), "Block: expected cols as an integer >= 1, got 1.5"),
        (lambda: ConstantFanIn(True), "ConstantFanIn: expected fan_in as an integer >= 1, got True"),
        (
            lambda: Unstructured().project(torch.tensor([[1.0, -torch.inf]]), 2),
            r"expected 2 entries for Unstructured\(\), got only 1 with a score above -inf",
        ),
    ],
)
def test_misfits_are_refused_with_numbers(call, message):
    with pytest.raises(PatternError, match=message):
        call()


def test_nan_scores_are_refused():
    for pattern in (Unstructured(), ConstantFanIn(), NM(1, 2), Block(1, 2), Strided(2)):
        with pytest.raises(NumericsError, match="1 NaN among"):
            pattern.project(torch.tensor([[1.0, torch.nan, 0.0, 2.0]]), 2)


def test_check_names_the_first_bad_row_of_constant_fan_in():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    with pytest.raises(PatternError, match="expected 2 ones in every row that has any, got 1 in row 2"):
        ConstantFanIn().check(mask)
    ConstantFanIn().check(mask[:2])
    with pytest.raises(PatternError, match=r"expected 1 ones .* got 2 in row 0"):
        ConstantFanIn(1).check(mask)


def test_check_names_the_first_bad_group_of_nm():
    mask = torch.zeros(3, 8)
    mask[1, 4:7] = 1
    with pytest.raises(
        PatternError, match="at most 2 ones in 4 input channels, got 3 in row 1, channels 4 to 7"
    ):
        NM(2, 4).check(mask.bool())
    conv = torch.zeros(2, 4, 1, 3)
    conv[1, :3, 0, 2] = 1
    with pytest.raises(PatternError, match="got 3 in row 1, channels 0 to 3, kernel position 2"):
        NM(2, 4).check(conv.bool())


def test_check_names_the_first_bad_group_of_strided():
    mask = torch.zeros(3, 8)
    mask[1, [1, 3, 5]] = 1
    with pytest.raises(
        PatternError, match="at most 1 one in 4 entries 2 apart, got 3 in row 1, entries 1, 3 and so on"
    ):
        Strided(4).check(mask.bool())
    Strided(4).check(torch.zeros(3, 8) > 0)


def test_check_names_the_first_bad_block():
    mask = torch.zeros(4, 4)
    mask[2, 2] = 1
    with pytest.raises(PatternError, match="got 1 ones of 4 in the block at row 2, channel 2"):
        Block(2, 2).check(mask.bool())


def test_patterns_that_need_the_whole_weight_say_so():
    assert all(p.streams for p in (Unstructured(), ConstantFanIn(), NM(2, 4), Strided(2), Block(2, 2)))
    assert not Transposable().streams
    assert [p.row_local for p in (Unstructured(), ConstantFanIn(), NM(2, 4), Block(2, 2))] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(("rows", "largest"), [(1, 1), (7, 1), (16, 1), (768, 48), (33, 2)])
def test_row_tiles_cover_the_rows_in_order_at_a_sixteenth_of_the_weight(rows, largest):
    tiles = list(row_tiles((rows, 5)))
    assert [first for first, _ in tiles] == [sum(n for _, n in tiles[:i]) for i in range(len(tiles))]
    assert sum(n for _, n in tiles) == rows
    assert max(n for _, n in tiles) == largest
