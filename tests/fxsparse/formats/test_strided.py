import pytest
import torch

from fxsparse.errors import PatternError
from fxsparse.formats import strided
from fxsparse.pattern import NM, ConstantFanIn, Strided


def weight_of(m, groups, rows=37):
    score = torch.randn(rows, m * groups, generator=torch.Generator().manual_seed(0))
    return score * Strided(m).project(score.abs(), 0)


@pytest.mark.parametrize("m", [2, 3, 4, 5, 8, 10, 16])
@pytest.mark.parametrize("groups", [1, 7, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_weight_comes_back(m, groups, dtype):
    weight = (9 * weight_of(m, groups)).to(dtype)
    packed = strided.pack(weight)
    assert packed["values"].dtype == dtype
    assert packed["dense"].shape == (0, 37, m * groups, m)
    assert torch.equal(strided.to_dense(**packed), weight)


def test_a_group_takes_one_slot_of_each_row():
    packed = strided.pack(weight_of(4, 128, rows=32))
    assert packed["values"].numel() == 32 * 128
    assert packed["places"].numel() * 8 == 32 * 128  # four bits each


@pytest.mark.parametrize(("m", "groups"), [(4, 64), (4, 30), (3, 100), (16, 5), (10, 7)])
def test_places_of_a_chunk_are_whole_groups(m, groups):
    columns = strided.columns_of(m * groups, m)
    used = columns[columns < m * groups]
    assert used.sort().values.tolist() == list(range(m * groups))
    for chunk in columns.view(-1, 16)[:, : 16 // m * m].reshape(-1, m).tolist():
        first = chunk[0]
        assert chunk == ([first + i * groups for i in range(m)] if first < groups else [m * groups] * m)
    assert len(columns) == 16 * -(-groups // (16 // m))


def test_the_inputs_of_a_place_are_neighbours_in_sixteen_chunks():
    columns = strided.columns_of(4 * 128, 4).view(-1, 16)
    assert columns[:16, 0].tolist() == list(range(16))
    assert columns[:16, 5].tolist() == list(range(128 + 16, 128 + 32))  # band 1, stride 1
    assert columns[16:, 0].tolist() == list(range(64, 80))


def test_the_number_of_strides_is_told_from_the_zeros():
    mask = Strided(4).project(torch.rand(20, 24), 0)
    assert strided.strides_of(mask) == 4
    mask[[3, 7]] = False  # ablated neurons
    mask[0, mask[0].nonzero()[0]] = False  # a value that became 0
    assert strided.strides_of(mask) == 4
    assert strided.strides_of(Strided(32).project(torch.rand(20, 64), 0)) == 16  # half empty
    assert strided.exact_strides(torch.tensor([4, 1, 0, 3]), 2, 8) == 4
    assert strided.exact_strides(torch.tensor([4, 1, 0, 2]), 2, 8) is None


@pytest.mark.parametrize(
    "weight",
    [
        NM(1, 4).project(torch.rand(20, 24), 0),
        ConstantFanIn(6).project(torch.rand(20, 24), 0),
        torch.ones(4, 8) > 0,
        torch.zeros(0, 8) > 0,
    ],
)
def test_other_zeros_are_refused_with_their_numbers(weight):
    assert strided.strides_of(weight) is None
    with pytest.raises(
        PatternError, match=rf"at most one nonzero of every M inputs .*a weight \[{len(weight)}, "
    ):
        strided.pack(weight.float())
