import pytest
import torch

from fxsparse.errors import PatternError
from fxsparse.formats import nm_lanes
from fxsparse.pattern import NM


def weight_of(n, m, rows=37, columns=48):
    score = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return score * NM(n, m).project(score.abs(), 0)


@pytest.mark.parametrize("group", [(1, 4), (2, 4), (1, 8), (3, 8), (4, 8), (1, 16), (5, 16), (8, 16)])
@pytest.mark.parametrize("columns", [48, 112, 1008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_weight_comes_back(group, columns, dtype):
    weight = (9 * weight_of(*group, columns=columns)).to(dtype)
    packed = nm_lanes.pack(weight)
    assert packed["values"].dtype == dtype
    assert packed["values"].shape[2] * packed["values"].shape[3] <= 8
    assert torch.equal(nm_lanes.to_dense(**packed), weight)


@pytest.mark.parametrize("columns", [1, 4, 20, 47])
def test_broken_chunks_and_groups_of_rows_are_filled_with_zeros(columns):
    weight = torch.zeros(3, columns)
    weight[1, columns - 1] = 2
    packed = nm_lanes.pack(weight)
    assert packed["values"].shape[0] == 1
    assert packed["values"].count_nonzero() == 1
    assert torch.equal(nm_lanes.to_dense(**packed), weight)


def test_entries_lie_by_step_and_places_in_four_bits_each():
    weight = torch.zeros(2, 64)
    weight[0, [3, 7, 18, 60]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weight[1, [15]] = 5.0
    packed = nm_lanes.pack(weight)
    assert packed["values"].shape == (1, 1, 4, 2, 16)  # four chunks of two steps are a run
    assert packed["values"][0, 0, :, :, 0].tolist() == [[1, 2], [0, 3], [0, 0], [0, 4]]
    places = packed["places"].shape, int(packed["places"][0, 0, 0]) & 0xFFFFFFFF
    assert places == ((1, 1, 16), 0xC0102073)
    assert tuple(packed["dense"].shape) == (0, 2, 64)


def test_a_ninth_entry_of_a_chunk_is_refused():
    weight = torch.zeros(2, 32)
    weight[1, 16:25] = 1
    with pytest.raises(PatternError, match=r"at most 8 nonzeros in every aligned chunk of 16 inputs, got 9"):
        nm_lanes.pack(weight)


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0)])
def test_a_weight_without_entries_is_packed(shape):
    packed = nm_lanes.pack(torch.empty(shape))
    assert nm_lanes.to_dense(**packed).shape == shape
