import pytest
import torch

from fxsparse.formats.column_blocks import WIDEST, from_dense, to_dense, width


def test_entries_go_block_by_block_and_row_by_row():
    matrix = torch.tensor([[1.0, 0, 2, 3, 0], [0, 0, 0, 0, 0], [0, 4, 0, 0, 5]]).bfloat16()
    blocks = from_dense(matrix, widest=3)
    assert blocks.values.tolist() == [1, 2, 4, 3, 5]
    assert blocks.columns.tolist() == [0, 2, 1, 0, 1]
    assert blocks.start.tolist() == [[0, 2, 2, 3], [3, 4, 4, 5]]
    assert [t.dtype for t in (blocks.values, blocks.start, blocks.columns)] == [
        torch.float32, torch.int32, torch.int16
    ]  # fmt: skip
    assert torch.equal(to_dense(blocks, 5), matrix.float())


@pytest.mark.parametrize("shape", [(3, 2 * WIDEST + 1), (4, WIDEST), (1, 1), (2, 0), (0, 7)], ids=str)
def test_comes_back_dense_and_blocks_are_no_wider_than_allowed(shape):
    matrix = torch.randn(shape) * (torch.rand(shape) < 0.1)
    blocks = from_dense(matrix)
    assert torch.equal(to_dense(blocks, shape[1]), matrix)
    assert len(blocks.start) == max(1, -(-shape[1] // WIDEST))
    assert width(shape[1]) <= WIDEST
    assert blocks.columns.numel() == 0 or blocks.columns.max() < width(shape[1])


def test_a_stored_entry_is_one_that_is_not_zero():
    assert from_dense(torch.zeros(4, 6)).values.numel() == 0
    assert from_dense(torch.ones(4, 6)).values.numel() == 24
