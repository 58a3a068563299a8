import pytest
import torch

from fxsparse.errors import PatternError
from fxsparse.formats import block_index, bsr, csr


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.4, 1.0])
def test_the_blocks_of_an_index_are_those_of_the_packed_weight(side, density):
    torch.manual_seed(side)
    kept = torch.rand(5, 3) < density
    kept[0] = torch.tensor([True, False, True]) if density else False  # never in blocks twice as large
    mask = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)
    weight = torch.randn(mask.shape).masked_fill(~mask, 0)
    index = csr.from_mask(mask)
    found, expected = block_index.of_csr(index, side), bsr.pack_for_training(weight)
    assert tuple(found) == block_index.PARTS
    if density:
        stored = csr.values_of(weight, index)
        assert torch.equal(stored[found["to_blocks"].long()], expected.pop("values"))
        assert all(torch.equal(found[name], part) for name, part in expected.items())
    slots = found["to_blocks"].flatten().long()
    assert torch.equal(found["to_entries"].long()[slots], torch.arange(len(slots)))


def test_entries_outside_of_blocks_are_refused():
    for mask in (
        torch.eye(32),
        torch.ones(24, 16),
        torch.zeros(32, 32).index_fill_(1, torch.arange(8, 24), 1),
    ):
        with pytest.raises(
            PatternError, match=r"entries that fill blocks of 16 x 16 in the \d+ x \d+ weight"
        ):
            block_index.of_csr(csr.from_mask(mask.bool()), 16)
