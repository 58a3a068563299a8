import pytest
import torch

from fxsparse.formats import narrow
from fxsparse.testing import sparse_weight


def test_int8_by_hand():
    weight = torch.tensor([[1.27, -0.634, 0.0, 0.004], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.02, 1.0, 0.01]])
    values, scales = narrow.rounded(weight, torch.int8)
    assert values.tolist() == [[127, -63, 0, 0], [0, 0, 0, 0], [-127, 1, 50, 0]]
    assert scales.tolist() == pytest.approx([0.01, 1.0, 0.02])
    assert values.dtype == torch.int8


def test_no_entry_is_off_by_more_than_half_a_step():
    weight = sparse_weight((37, 53), 0.3).float()
    error = (narrow.nearest(weight, torch.int8) - weight).abs().amax(1)
    assert bool((error <= 0.5001 * weight.abs().amax(1) / 127).all())
    assert error.max() > 0


def test_bfloat16_rounds_every_entry_and_has_scales_of_one():
    weight = torch.randn(5, 7)
    values, scales = narrow.rounded(weight, torch.bfloat16)
    assert torch.equal(values, weight.bfloat16())
    assert scales.tolist() == [1.0] * 5
    assert torch.equal(narrow.nearest(weight, torch.bfloat16), weight.bfloat16().float())


@pytest.mark.parametrize("dtype", list(narrow.DTYPES.values()))
def test_rounding_again_changes_at_most_the_last_bit(dtype):
    once = narrow.nearest(torch.randn(40, 50), dtype)
    again = narrow.nearest(once, dtype)
    torch.testing.assert_close(once, again, rtol=2.5e-7, atol=0)
    assert torch.equal(narrow.rounded(once, dtype)[0], narrow.rounded(again, dtype)[0])


@pytest.mark.parametrize("dtype", list(narrow.DTYPES.values()))
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
def test_entries_are_rounded_as_the_dense_weight_is(dtype, of):
    weight = sparse_weight((37, 53), 0.2).to(of)
    rows, columns = weight.nonzero().unbind(1)
    values, scales = narrow.rounded(weight, dtype)
    by_entry, same = narrow.rounded_entries(weight[rows, columns], rows.int(), 37, dtype)
    assert torch.equal(by_entry, values[rows, columns])
    assert torch.equal(same, scales)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_weight_without_entries_has_scales_of_one(shape):
    values, scales = narrow.rounded(torch.empty(shape), torch.int8)
    assert values.shape == shape
    assert scales.tolist() == [1.0] * shape[0]
