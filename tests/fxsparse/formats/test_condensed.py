import pytest
import torch

from fxsparse.errors import PatternError
from fxsparse.formats import condensed


def test_packs_values_and_ascending_columns_by_the_mask_even_where_a_weight_is_zero():
    weight = torch.tensor([[0.0, 2.0, 3.0], [4.0, 5.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    buffers = condensed.pack(weight, mask)
    assert buffers["values"].tolist() == [[0.0, 2.0], [4.0, 5.0]]
    assert buffers["indices"].tolist() == [[0, 1], [0, 1]]
    assert torch.equal(condensed.to_dense(*buffers.values(), in_features=3), weight * mask)


def test_indices_widen_where_int16_cannot_count():
    weight = torch.zeros(2, 32768)
    weight[:, -1] = 1.0
    buffers = condensed.pack(weight)
    assert buffers["indices"].dtype == torch.int32
    assert buffers["indices"].tolist() == [[32767], [32767]]
    assert condensed.pack(weight[:, 1:])["indices"].dtype == torch.int16


def test_empty_rows_are_named_and_a_row_that_sums_to_zero_is_not_empty():
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 3.0]])
    buffers = condensed.pack(weight)
    assert buffers["values"].tolist() == [[1.0, -1.0], [2.0, 3.0]]
    assert buffers["indices"].tolist() == [[0, 1], [0, 2]]
    assert buffers["active_rows"].tolist() == [1, 3]
    assert buffers["empty_rows"].tolist() == [0, 2]
    assert buffers["active_rows"].dtype == buffers["empty_rows"].dtype == torch.int32
    assert torch.equal(condensed.to_dense(*buffers.values(), in_features=3), weight)


def test_an_active_zero_keeps_its_row():
    mask = torch.tensor([[True, False], [False, False]])
    buffers = condensed.pack(torch.zeros(2, 2), mask)
    assert buffers["values"].tolist() == [[0.0]]
    assert buffers["active_rows"].tolist() == [0]


def test_fan_in_counts_nonempty_rows_only():
    assert condensed.fan_in(torch.tensor([[0, 0], [1, 0], [0, 1]]) == 1) == 1
    assert condensed.fan_in(torch.tensor([[0, 0], [1, 0], [1, 1]]) == 1) is None
    assert condensed.fan_in(torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_refuses_rows_of_different_fan_in_by_name():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    with pytest.raises(PatternError, match="row 1 has 1 nonzeros, row 2 has 2"):
        condensed.pack(weight)
