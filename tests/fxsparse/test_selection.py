import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxsparse.errors import InvariantError
from fxsparse.selection import (
    MaskChange,
    check_positions,
    random_positions,
    to_mask,
    to_positions,
    union,
)

sets = st.sets(st.integers(0, 30))


def ascending(entries):
    return torch.tensor(sorted(entries), dtype=torch.int64)


def test_positions_and_mask_are_inverse():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert to_positions(mask).tolist() == [0, 2, 5]
    assert torch.equal(to_mask(to_positions(mask), (2, 3)), mask)


@given(sets, sets)
def test_a_change_is_the_set_difference(old, new):
    change = MaskChange.between(ascending(old), ascending(new))
    assert change.kept.tolist() == sorted(old & new)
    assert change.pruned.tolist() == sorted(old - new)
    assert change.grown.tolist() == sorted(new - old)
    assert ascending(old)[change.kept_from].tolist() == change.kept.tolist()
    assert ascending(new)[change.kept_to].tolist() == change.kept.tolist()


def test_values_travel_with_kept_entries_and_grown_ones_start_at_zero():
    # old {1, 4, 6}, new {0, 4, 6, 9}: 4 and 6 keep 20 and 30; 0 and 9 are new.
    change = MaskChange.between(ascending({1, 4, 6}), ascending({0, 4, 6, 9}))
    assert change.carry(torch.tensor([10.0, 20.0, 30.0])).tolist() == [0.0, 20.0, 30.0, 0.0]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([True, False]), "expected flat positions as int64"),
        (torch.tensor([[1, 2]]), r"got torch.int64 \[1, 2\]"),
        (torch.tensor([3, 1]), "got 1 after 3 at index 1"),
        (torch.tensor([1, 1]), "got 1 after 1 at index 1"),
        (torch.tensor([2, 10]), "expected positions from 0 to 9, got 2 to 10"),
        (torch.tensor([-1, 2]), "got -1 to 2"),
    ],
)
def test_malformed_positions_are_named(positions, message):
    with pytest.raises(InvariantError, match=f"blk.weight: .*{message}"):
        check_positions(positions, 10, "blk.weight")


def test_well_formed_positions_pass():
    check_positions(torch.tensor([0, 9]), 10, "w")
    check_positions(torch.empty(0, dtype=torch.int64), 10, "w")


def test_random_positions_are_distinct_and_every_set_is_as_likely():
    generator = torch.Generator().manual_seed(0)
    seen = Counter(tuple(random_positions(3, 6, generator).tolist()) for _ in range(4000))
    assert set(seen) == set(itertools.combinations(range(6), 3))
    assert all(140 < count < 270 for count in seen.values())  # 200 expected, standard deviation 14
    assert random_positions(0, 6, generator).tolist() == []
    assert random_positions(1000, 2**40, generator).diff().min() > 0


def test_random_positions_beside_those_that_are_taken():
    generator, taken = torch.Generator().manual_seed(0), torch.tensor([1, 4])
    seen = Counter(tuple(random_positions(2, 6, generator, taken).tolist()) for _ in range(3000))
    assert set(seen) == set(itertools.combinations((0, 2, 3, 5), 2))
    assert all(400 < count < 600 for count in seen.values())  # 500 expected, standard deviation 20
    assert random_positions(4, 6, generator, taken).tolist() == [0, 2, 3, 5], "all that is left"


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0), (40, 60)])
def test_union_of_ascending_positions(sizes):
    one, other = torch.randperm(100)[: sum(sizes)].split(sizes)
    one, other = one.sort().values, other.sort().values
    assert torch.equal(union(one, other), torch.cat([one, other]).sort().values)
