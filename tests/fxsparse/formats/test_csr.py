import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import PatternError
from fxsparse.formats import csr


def test_index_of_a_small_weight():
    # [[. a .], [b . c], [. . .], [. d e]]: rows 0 1 1 3 3, columns 1 0 2 1 2; by column: b, a d, c e.
    mask = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 1]]).bool()
    index = csr.from_mask(mask)
    assert index.indices.tolist() == [[0, 1, 1, 3, 3], [1, 0, 2, 1, 2]]
    assert index.crow.tolist() == [0, 1, 3, 3, 5]
    assert index.ccol.tolist() == [0, 1, 3, 5]
    assert index.rows_t.tolist() == [1, 0, 3, 1, 3]
    assert index.perm.tolist() == [1, 0, 3, 2, 4]
    assert {t.dtype for t in (index.indices, index.crow, index.ccol, index.rows_t, index.perm)} == {
        torch.int32
    }


def tensors(index):
    return index.indices, index.crow, index.ccol, index.rows_t, index.perm


def test_unused_slots_hold_minus_one_and_no_pointer_reaches_them():
    index = csr.from_flat(torch.tensor([1, 3, 5, 10, 11]), (4, 3), capacity=7)
    csr.move_(index, torch.tensor([1, 10]))
    assert (index.nnz, index.capacity) == (2, 7)
    assert index.indices.tolist() == [[0, 3, -1, -1, -1, -1, -1], [1, 1, -1, -1, -1, -1, -1]]
    assert index.crow.tolist() == [0, 1, 1, 1, 2]
    assert index.ccol.tolist() == [0, 0, 2, 2]
    assert index.rows_t.tolist() == [0, 3, -1, -1, -1, -1, -1]
    assert index.perm.tolist() == [0, 1, -1, -1, -1, -1, -1]
    assert csr.values_of(torch.arange(12.0).reshape(4, 3), index).tolist() == [1, 10, 0, 0, 0, 0, 0]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 81), st.integers(0, 81), st.integers(0, 1000))
def test_round_trips_and_moves_in_place(rows, columns, nnz, spare, seed):
    generator = torch.Generator().manual_seed(seed)
    capacity = min(nnz + spare, rows * columns)
    counts = (min(nnz, capacity), int(torch.randint(capacity + 1, (), generator=generator)))
    first, second = (torch.randperm(rows * columns, generator=generator)[:n].sort().values for n in counts)
    index = csr.from_flat(first, (rows, columns), capacity)
    addresses = [tensor.data_ptr() for tensor in tensors(index)]
    csr.move_(index, second)
    assert addresses == [tensor.data_ptr() for tensor in tensors(index)]
    assert torch.equal(csr.flat_of(index), second)
    dense = torch.zeros(rows * columns).index_fill_(0, second, 1.0).reshape(rows, columns)
    values = csr.values_of(dense, index)
    assert values.tolist() == [1.0] * len(second) + [0.0] * (capacity - len(second))
    assert torch.equal(csr.to_dense(values, index), dense)
    again = csr.from_indices(index.indices.clone(), (rows, columns))
    fresh = csr.from_flat(second, (rows, columns), capacity)
    for a, b, c in zip(tensors(index), tensors(again), tensors(fresh), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(
    "indices",
    [
        [[0, -1, 1], [2, -1, 3]],  # a gap before an entry
        [[0, 1, -1], [2, 3, 0]],  # a column without a row
        [[0, 1, -2], [2, 3, -2]],
        [[0, 3, -1], [2, 0, -1]],  # row 3 of 3
        [[0, 1, -1], [4, 0, -1]],  # column 4 of 4
        [[0, 1, -1], [-1, 0, -1]],
        [[1, 0, -1], [0, 0, -1]],  # out of order
        [[1, 1, -1], [2, 2, -1]],  # twice
    ],
)
def test_refuses_broken_saved_indices(indices):
    with pytest.raises(PatternError, match="inside the 3 x 4 weight"):
        csr.from_indices(torch.tensor(indices, dtype=torch.int32), (3, 4))


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ([0, 1, 2], "room for 2 entries, got 3"),
        ([3, 1], "strictly ascending"),
        ([1, 1], "strictly ascending"),
        ([1, 12], "inside the 3 x 4 weight"),
        ([-1, 2], "inside the 3 x 4 weight"),
    ],
)
def test_refuses_positions_that_do_not_fit(flat, message):
    index = csr.from_flat(torch.tensor([0, 5]), (3, 4))
    with pytest.raises(PatternError, match=message):
        csr.move_(index, torch.tensor(flat))
    assert csr.flat_of(index).tolist() == [0, 5]
