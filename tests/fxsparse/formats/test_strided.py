import pytest
import torch

from fxsparse.formats import strided
from fxsparse.pattern import NM, ConstantFanIn, Strided


def test_the_number_of_strides_is_told_from_the_zeros():
    mask = Strided(4).project(torch.rand(20, 24), 0)
    assert strided.stride_of(mask) == 4
    mask[[3, 7]] = False  # ablated neurons
    assert strided.stride_of(mask) == 4
    assert strided.stride_of(Strided(3).project(torch.rand(20, 24), 0)) == 3


@pytest.mark.parametrize(
    "mask",
    [
        NM(1, 4).project(torch.rand(20, 24), 0),
        ConstantFanIn(6).project(torch.rand(20, 24), 0),
        ConstantFanIn(5).project(torch.rand(20, 24), 0),
        ConstantFanIn(1).project(torch.rand(20, 24), 0),
        torch.ones(4, 8) > 0,
        torch.zeros(4, 8) > 0,
        torch.zeros(0, 8) > 0,
    ],
)
def test_other_zeros_are_not_strided(mask):
    assert strided.stride_of(mask) is None
