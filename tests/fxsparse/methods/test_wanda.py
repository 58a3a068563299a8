import pytest
import torch

from fxsparse.methods import wanda
from fxsparse.methods.wanda import row_by_row
from fxsparse.pattern import NM, Block, ConstantFanIn, Unstructured

prune = wanda().one_shot


def test_the_golden_vector():
    weight = torch.tensor([[0.5, -0.1, 0.3, 0.2], [0.05, 0.4, -0.3, 0.1]])
    norms = torch.tensor([1.0, 4.0, 0.5, 3.0])
    pruned, note = prune(weight, norms.double() ** 2, Unstructured(), 4)
    assert torch.equal(pruned, weight * torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]]))
    assert note == ""


@pytest.mark.parametrize("nnz", [0, 6, 13, 17, 24])
def test_rows_keep_as_many_each_and_the_total_is_exact(nnz):
    chosen = row_by_row(torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), nnz)
    counts = chosen.sum(1)
    assert int(counts.sum()) == nnz
    assert int(counts.max() - counts.min()) <= 1


def test_the_odd_entries_go_to_the_rows_with_the_largest_next_score():
    score = torch.tensor([[9.0, 1, 0], [8.0, 7, 0], [9.0, 2, 0]])
    assert row_by_row(score, 4).tolist() == [[True, False, False], [True, True, False], [True, False, False]]


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 2), ConstantFanIn()], ids=str)
def test_the_pattern_holds_and_the_scale_of_the_inputs_counts_for_nothing(pattern):
    draw = torch.Generator().manual_seed(0)
    weight, squares = torch.randn(8, 16, generator=draw), torch.rand(16, generator=draw).double()
    pruned, _ = prune(weight, squares, pattern, 64)
    pattern.check(pruned != 0)
    assert int((pruned != 0).sum()) == 64
    assert torch.equal(prune(weight, 4096 * squares, pattern, 64)[0], pruned)
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


def test_n_of_m_counts_what_stays():
    kept = prune(torch.rand(3, 8) + 1, torch.ones(8), NM(1, 4), 6)[0] != 0
    assert kept.view(3, 2, 4).sum(2).eq(1).all()
