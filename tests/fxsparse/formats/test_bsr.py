import pytest
import torch

from fxsparse.formats import bsr


def blocked(block, rows=6, columns=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < 0.4
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return torch.randn(mask.shape, generator=generator) * mask


@pytest.mark.parametrize("block", bsr.BLOCKS)
def test_the_largest_blocks_that_fit_are_found_and_come_back(block):
    weight = blocked(block)
    packed = bsr.pack(weight)
    found = bsr.block_of(weight != 0)
    assert found[0] % block[0] == 0
    assert found[1] % block[1] == 0
    assert packed["values"].shape[1:] == found[::-1]
    assert torch.equal(bsr.to_dense(**packed), weight)


def test_scattered_zeros_are_blocks_of_one():
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    packed = bsr.pack(weight)
    assert bsr.block_of(weight != 0) == (1, 1)
    assert packed["values"].flatten().tolist() == [1.0, 2.0, 3.0]
    assert packed["crow"].tolist() == [0, 2, 3]
    assert packed["columns"].tolist() == [0, 2, 1]
    assert torch.equal(bsr.to_dense(**packed), weight)


def test_empty_and_full_weights():
    for weight in (torch.zeros(8, 8), torch.ones(8, 8), torch.ones(3, 5)):
        assert torch.equal(bsr.to_dense(**bsr.pack(weight)), weight)


def test_a_zero_inside_a_kept_block_is_stored():
    weight = blocked((8, 8))
    weight[weight.nonzero()[0][0], weight.nonzero()[0][1]] = 0
    assert bsr.block_of(weight != 0) != (8, 8)
    assert torch.equal(bsr.to_dense(**bsr.pack(weight)), weight)


@pytest.mark.parametrize("block", bsr.BLOCKS)
def test_bfloat16_lies_in_pairs_of_columns(block):
    weight = blocked(block).bfloat16()
    packed = bsr.pack(weight)
    height, width = bsr.block_of(weight != 0)
    pairs = (width // 2, height, 2)
    assert packed["values"].shape[1:] == ((width, height) if width % 2 else pairs)
    assert torch.equal(bsr.to_dense(**packed), weight)
    if width % 2 == 0:
        first = int(packed["columns"][0]) * width
        row = int((packed["crow"] > 0).nonzero()[0]) - 1
        assert packed["values"][0, 0, 0].tolist() == weight[row * height, first : first + 2].tolist()
