from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.formats import striped


def dense(packed):
    values, *index = packed.values()
    weight = torch.zeros(index[-1].shape[1:])
    weight[striped.positions(*index)] = values
    return weight


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 40, 511, 513, 1100]),
    columns=st.sampled_from([0, 1, 127, 128, 129, 300]),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_entry_is_held_once_and_none_more(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    weight = torch.where(mask, torch.randn(rows, columns, generator=generator), 0.0)
    packed = striped.pack(weight)
    assert torch.equal(dense(packed), weight)
    assert packed["values"].numel() == int((weight != 0).sum())


def test_a_small_weight_by_hand():
    weight = torch.zeros(514, 130)
    weight[0, [1, 2]] = torch.tensor([5.0, 6.0])
    weight[2, 0], weight[0, 129], weight[513, 128] = 7, 8, 9
    packed = striped.pack(weight)
    # Row 2 before row 0, which has more in the first stripe; the second chunk has its rows from 512 on.
    assert packed["values"].tolist() == [7, 5, 6, 8, 9]
    assert packed["columns"].tolist() == [0, 1, 2, 1, 0]
    assert packed["rows"].tolist() == [2, 0, 0, 1]
    assert packed["lengths"].tolist() == [1, 2, 1, 1]
    assert packed["starts"].tolist() == [[0, 0], [2, 3], [3, 4], [3, 4], [4, 5]]
    assert packed["dense"].shape == (0, 514, 130)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_lengths_do_not_fall_within_a_tile(density):
    packed = striped.pack(
        (torch.rand(600, 300, generator=torch.Generator().manual_seed(0)) < density).float()
    )
    starts = packed["starts"][:, 0].tolist()
    assert len(starts) == 2 * 3 + 1
    for first, last in pairwise(starts):
        assert bool((packed["lengths"][first:last].int().diff() >= 0).all())
