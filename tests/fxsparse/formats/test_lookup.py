import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.formats import lookup


def dense(packed, shape):
    entries = lookup.unpack(*packed.values())
    weight = torch.zeros(shape)
    weight[entries.rows, entries.columns] = entries.values
    return weight


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_entry_is_held_once_and_none_more(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    weight = torch.randn(rows, columns, generator=generator) * mask
    packed = lookup.pack(weight, mask)
    assert torch.equal(dense(packed, weight.shape), weight)
    assert int((packed["columns"] >= 128).sum()) == int(mask.sum())
    assert sorted([*packed["active_rows"].tolist(), *packed["empty_rows"].tolist()]) == list(range(rows))


def test_a_small_weight_by_hand():
    weight = torch.zeros(3, 130)
    weight[0, 129], weight[2, 1], weight[2, 70] = 5, 6, 7
    packed = lookup.pack(weight)
    assert packed["active_rows"].tolist() == [2, 0]  # longest first
    assert packed["empty_rows"].tolist() == [1]
    # Row 2 takes column 70 in the second window, where row 0 takes its own, which the last half of it holds.
    assert packed["counts"].tolist() == [[1, 1, 0]]
    assert packed["starts"].tolist() == [0, 2]
    first, last = packed["values"]
    assert (first[0], last[0], last[1]) == (6, 7, 5)
    order = lookup.byte_order()
    bundle = torch.zeros(2, 64, dtype=torch.uint8)
    bundle[:, order] = packed["columns"]
    assert (bundle[0, 0], bundle[1, 0], bundle[1, 1]) == (128 + 1, 128 + 70, 128 + 129 % 128)


def test_keeps_an_active_zero_and_a_row_that_sums_to_zero():
    weight = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]])
    mask = torch.tensor([[True, True, True], [False, False, True]])
    entries = lookup.unpack(*lookup.pack(weight, mask).values())
    assert list(zip(*[t.tolist() for t in entries], strict=True)) == [
        (0, 0, 1.0), (0, 1, -1.0), (0, 2, 0.0), (1, 2, 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "fan_in", "filled"), [(318, 741, 0.90), (768, 307, 0.79), (768, 31, 0.37)])
def test_few_slots_stay_empty(rows, fan_in, filled):
    columns = torch.rand(rows, 3072, generator=torch.Generator().manual_seed(0)).topk(fan_in, 1).indices
    packed = lookup.pack(torch.zeros(rows, 3072).scatter_(1, columns, 1.0))
    assert rows * fan_in / packed["values"].numel() > filled
