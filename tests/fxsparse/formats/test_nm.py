import pytest
import torch

from fxsparse.errors import PatternError
from fxsparse.formats import nm
from fxsparse.pattern import NM


def weight_of(n, m, rows=5, groups=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, groups * m, generator=generator)
    return torch.randn(score.shape, generator=generator) * NM(n, m).project(score, 0)


@pytest.mark.parametrize("group", [(1, 4), (2, 4), (1, 8), (2, 8), (3, 8), (1, 16), (5, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_group_is_found_and_the_weight_comes_back(group, dtype):
    weight = (10 * weight_of(*group)).to(dtype)
    weight[:, : group[0]] = 1  # casts to int8 leave nothing full
    weight[:, group[0] : group[1]] = 0
    assert nm.group_of(weight != 0) == group
    packed = nm.pack(weight)
    assert packed["values"].shape == packed["positions"].shape == (5, 6 * group[0])
    assert (packed["values"].dtype, packed["positions"].dtype) == (dtype, torch.uint8)
    assert tuple(packed["group"].shape) == (0, *group)
    assert torch.equal(nm.to_dense(**packed), weight)


def test_positions_ascend_and_zeros_take_the_lowest_free_places():
    weight = torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 6.0, 0.0, 7.0]])
    packed = nm.pack(weight)
    assert packed["positions"].tolist() == [[0, 2, 0, 1, 1, 3]]
    assert packed["values"].tolist() == [[0.0, 5.0, 0.0, 0.0, 6.0, 7.0]]


def test_what_stores_least_is_found():
    assert nm.group_of(weight_of(1, 4, groups=8) != 0) == (1, 4)
    spread = torch.zeros(1, 32)
    spread[0, [0, 1, 8, 9, 16, 17, 24, 25]] = 1
    assert nm.group_of(spread != 0) == (2, 8)
    assert nm.group_of(torch.zeros(3, 32) != 0) == (1, 16)
    assert nm.group_of(torch.zeros(3, 12) != 0) == (1, 4)


@pytest.mark.parametrize("mask", [torch.ones(4, 16), torch.ones(4, 6), torch.ones(0, 16), torch.ones(4, 0)])
def test_nothing_is_found_where_more_than_half_is_there_or_groups_do_not_fit(mask):
    assert nm.group_of(mask != 0) is None
    with pytest.raises(PatternError, match=r"M of \(4, 8, 16\)"):
        nm.pack(mask)


def test_a_wider_group_can_be_asked_for_and_a_tighter_one_is_refused():
    weight = weight_of(1, 4)
    packed = nm.pack(weight, (2, 4))
    assert packed["values"].shape == (5, 12)
    assert torch.equal(nm.to_dense(**packed), weight)
    for group in ((1, 8), (2, 16)):
        with pytest.raises(
            PatternError, match=f"at most {group[0]} nonzeros in every aligned group of {group[1]}"
        ):
            nm.pack(weight, group)


def test_the_dense_weight_is_differentiable_in_the_values():
    packed = dict(nm.pack(weight_of(2, 8).double()))
    values = packed.pop("values").requires_grad_()
    assert torch.autograd.gradcheck(lambda v: nm.to_dense(v, **packed), (values,))


def test_groups_of_no_power_of_2_are_refused():
    with pytest.raises(PatternError, match="expected N:M with M a power of 2, got 3:6"):
        nm.pack(torch.ones(2, 12) * torch.tensor([1.0, 0.0]).repeat(6), (3, 6))
