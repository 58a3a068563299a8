import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxsparse.errors import InvariantError
from fxsparse.redistribution import shares

WEIGHTS = st.lists(
    st.tuples(st.floats(0, 1e6, allow_subnormal=False), st.integers(0, 50)), min_size=1, max_size=6
)


def test_shares_are_by_largest_remainders():
    """DSR's of 60 where 60, 290 and 40 survive: 9.23, 44.62, 6.15."""
    assert shares(60, [60, 290, 40], [1000, 1000, 1000]) == [9, 45, 6]
    assert shares(1, [1, 1], [5, 5]) == [1, 0]
    assert shares(0, [1, 1], [5, 5]) == [0, 0]


def test_what_does_not_fit_spills_over():
    assert shares(60, [60, 290, 40], [1000, 20, 1000]) == [24, 20, 16]
    assert shares(10, [1, 0, 0], [4, 5, 5]) == [4, 3, 3]


@given(WEIGHTS, st.floats(0, 1))
def test_the_sum_is_exact_and_no_capacity_is_exceeded(weights, part):
    wanted, capacities = zip(*weights, strict=True)
    total = round(part * sum(capacities))
    found = shares(total, wanted, capacities)
    assert sum(found) == total
    assert all(0 <= count <= most for count, most in zip(found, capacities, strict=True))


def test_too_little_room_is_named():
    with pytest.raises(InvariantError, match="room for 11 entries, got 10 in 2 weights"):
        shares(11, [1, 1], [5, 5])
