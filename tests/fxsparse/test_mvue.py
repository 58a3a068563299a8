import pytest
import torch

from fxsparse.mvue import keep_probabilities, mvue24

ROW = torch.tensor([0.9, -0.4, 0.1, -1.2], dtype=torch.float64)


def test_keep_probabilities_worked_out_beforehand():
    found = keep_probabilities(ROW.abs())
    torch.testing.assert_close(
        found, torch.tensor([0.71964, 0.373316, 0.098784, 0.80826], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert float(found.sum()) == pytest.approx(2, abs=1e-14)


def test_every_pair_at_its_odds_gives_the_tensor_back():
    """The draw is a function of two uniform numbers, constant between the ends of its intervals: an exact mean."""
    size, mean = ROW.abs(), torch.zeros(4, dtype=torch.float64)
    ends = torch.cat([torch.zeros(1), size.cumsum(0) / size.sum()]).double()
    for i in range(4):
        left = size.clone()
        left[i] = 0
        inner = torch.cat([torch.zeros(1), left.cumsum(0) / left.sum()]).double()
        for j in {0, 1, 2, 3} - {i}:
            numbers = torch.stack([(ends[i] + ends[i + 1]) / 2, (inner[j] + inner[j + 1]) / 2])
            found = mvue24(ROW, numbers[:, None])
            assert found.nonzero().flatten().tolist() == sorted((i, j))
            mean += (ends[i + 1] - ends[i]) * (inner[j + 1] - inner[j]) * found
    torch.testing.assert_close(mean, ROW, rtol=1e-13, atol=1e-15)


def test_small_and_zero_groups_lose_nothing():
    hard = torch.tensor([[0.0, 0, 0, 0], [0, -3, 0, 0], [0, 2, 0, -1], [1, 1e-12, 1e-12, 1e-12]])
    found = mvue24(hard.flatten(), torch.full((2, 4), 1 - 2**-24)).view(4, 4)
    assert torch.equal(found[:3], hard[:3])
    torch.testing.assert_close(found[3], torch.tensor([1, 0, 0, 3e-12]), rtol=1e-5, atol=0)
