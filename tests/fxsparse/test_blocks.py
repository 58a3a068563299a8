import torch

from fxsparse.blocks import Grid
from fxsparse.pattern import Block
from fxsparse.testing import forbid_tensors_of


def test_sums_of_blocks_are_the_same_however_rows_are_cut():
    score, grid = torch.rand(12, 6, 3), Grid((12, 6, 3), 4, 2)
    whole = grid.sums([score.flatten(1)])
    assert torch.equal(grid.sums(score.flatten(1).split(5)), whole)
    torch.testing.assert_close(whole.view(grid.size), score.double().view(3, 4, 3, 2, 3).sum((1, 3)))
    numbers = grid.numbers(torch.arange(score.numel()))
    assert numbers.bincount().tolist() == [grid.entries] * 27
    for block in range(27):
        assert (
            grid.positions(torch.tensor([block])).tolist() == (numbers == block).nonzero().flatten().tolist()
        )
    assert grid.positions(torch.tensor([3, 20])).diff().min() > 0


def test_sums_at_positions_are_those_of_whole_blocks_and_no_block_with_holes():
    grid, score = Grid((6, 8, 2), 3, 2), torch.rand(6, 8, 2)
    blocks = torch.tensor([1, 5, 14])
    positions = grid.positions(blocks)
    sums = grid.sums_at(score.flatten()[positions], positions)
    torch.testing.assert_close(sums[blocks], grid.sums([score.flatten(1)])[blocks])
    assert sums.isfinite().nonzero().flatten().tolist() == blocks.tolist()
    assert grid.sums_at(score.flatten()[positions[1:]], positions[1:]).isfinite().sum() == 2


def test_narrow_blocks_are_chosen_without_a_tensor_of_the_weights_size():
    shape = (256, 64)
    tiles = [(first, torch.rand(16, 64)) for first in range(0, 256, 16)]
    with forbid_tensors_of(256 * 64):
        positions = Block(16, 1).project_tiles(tiles, shape, 1024)
    whole = Block(16, 1).project(torch.cat([scores for _, scores in tiles]), 1024)
    assert torch.equal(positions, whole.flatten().nonzero().flatten())
