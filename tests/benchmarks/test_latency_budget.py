import torch
from torch import nn

from benchmarks import latency_budget


def small() -> nn.Module:
    torch.manual_seed(0)
    # The first weight takes nearly all the time.
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * 28 * 28, 1024), nn.Linear(1024, 10))


def test_a_row_has_the_share_asked_for_and_the_one_measured():
    share, zeros, measured, dense, ours = latency_budget.met(small, ("3",), 0.5)
    assert share == 0.5
    assert 0 < zeros < 1
    assert measured > 0
    assert ours > 0
    assert dense > 0
