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


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 81), st.integers(0, 1000))
def test_round_trips_and_moves_in_place(rows, columns, nnz, seed):
    generator = torch.Generator().manual_seed(seed)
    nnz = min(nnz, rows * columns)
    draws = [torch.randperm(rows * columns, generator=generator)[:nnz].sort().values for _ in range(2)]
    index = csr.from_flat(draws[0], (rows, columns))
    addresses = [t.data_ptr() for t in (index.indices, index.crow, index.ccol, index.rows_t, index.perm)]
    csr.move_(index, draws[1])
    assert addresses == [
        t.data_ptr() for t in (index.indices, index.crow, index.ccol, index.rows_t, index.perm)
    ]
    assert torch.equal(csr.flat_of(index), draws[1])
    dense = torch.zeros(rows * columns).index_fill_(0, draws[1], 1.0).reshape(rows, columns)
    assert torch.equal(csr.to_dense(torch.ones(nnz), index), dense)
    assert torch.equal(csr.from_indices(index.indices.clone(), (rows, columns)).perm, index.perm)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ([0, 1, 2], "holds exactly 2 entries, got 3"),
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
