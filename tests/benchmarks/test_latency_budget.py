import torch
from torch import nn

from benchmarks import latency_budget


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 16, stride=16), nn.Flatten(), nn.Linear(8 * 14 * 14, 512), nn.Linear(512, 10)
    )


def test_a_row_has_the_share_asked_for_and_the_one_measured():
    share, zeros, measured, dense, ours = latency_budget.met(small, ("0", "3"), 0.5)
    assert share == 0.5
    assert 0 < zeros < 1
    assert measured > 0
    assert ours > 0
    assert dense > 0
