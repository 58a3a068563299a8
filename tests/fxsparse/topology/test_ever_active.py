import pytest
import torch

from fxsparse.topology import EverActive


def positions(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_positions_are_held_while_they_are_smaller_than_bits():
    ever = EverActive.of(positions(3, 900), 1000)  # two of four bytes each against 125
    ever.add(positions(5, 900))
    assert (ever.count, ever.held.dtype, ever.held.tolist()) == (3, torch.int32, [3, 5, 900])


def test_bits_from_where_they_are_smaller():
    ever = EverActive.of(positions(0, 9), 10)  # eight bytes against two
    assert (ever.count, ever.held.dtype, ever.held.tolist()) == (2, torch.uint8, [0b1, 0b10])
    ever.add(positions(0, 1, 7, 8))
    assert (ever.count, ever.held.tolist()) == (5, [0b1000_0011, 0b11])


def test_positions_above_int32_are_kept_whole():
    ever = EverActive.of(positions(7, 2**31), 2**31 + 1)
    assert (ever.held.dtype, ever.held.tolist()) == (torch.int64, [7, 2**31])


@pytest.mark.parametrize("numel", [1, 8, 9, 1000, 4096])
def test_equals_a_dense_mask_and_never_costs_more_than_a_bit_per_entry(numel):
    generator = torch.Generator().manual_seed(numel)
    seen = torch.zeros(numel, dtype=torch.bool)
    ever = EverActive.of(positions(), numel)
    for _ in range(40):
        new = (torch.rand(numel, generator=generator) < 0.02).nonzero().squeeze(1)
        seen[new] = True
        ever.add(new)
        assert ever.count == int(seen.sum())
        assert ever.held.nbytes <= (numel + 7) // 8
