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


def test_refuses_rows_of_different_fan_in_by_name():
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    with pytest.raises(PatternError, match=r"row 0 has \[1\] nonzeros, row 1 has \[2\]"):
        condensed.pack(weight)
