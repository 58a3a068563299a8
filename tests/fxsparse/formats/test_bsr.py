import pytest
import torch

from fxsparse.errors import PatternError
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


def test_small_weights_are_joined_into_one():
    weights = [blocked((16, 16), rows, 3, seed) for seed, rows in enumerate((2, 1, 4))]
    parts = [bsr.pack_for_inference(weight) for weight in weights]
    for share, exact in ((True, torch.cat(weights)), (False, torch.block_diag(*weights))):
        joined = bsr.joined(parts, share)
        expected = bsr.pack_for_inference(exact)
        assert list(joined) == list(expected)
        assert all(torch.equal(joined[name], expected[name]) for name in joined)
        turned, again = bsr.by_column(joined), bsr.pack_for_training(exact)
        assert all(torch.equal(turned[name], again[name]) for name in turned)


def test_blocks_or_inputs_of_several_sizes_are_not_joined():
    parts = [bsr.pack_for_inference(blocked((16, 16), 2, columns)) for columns in (3, 4)]
    assert bsr.joined(parts, share_input=False)["dense"].shape == (0, 64, 112)
    with pytest.raises(PatternError, match="inputs of one width"):
        bsr.joined(parts)
    with pytest.raises(PatternError, match="blocks of one size"):
        bsr.joined([parts[0], bsr.pack_for_inference(blocked((32, 32)))], share_input=False)
