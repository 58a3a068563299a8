import pytest

from fxsparse.allocation import Target
from fxsparse.allocation.proportional import proportional


def test_a_capped_weight_is_dense_and_the_others_share_the_rest(shape):
    # Half of 150 is 75.  Raw 1 and 0.1: scale 75/60 would give "a" 1.25, so "a" takes 50, "b" 25 of 100.
    specs = [shape("a", (50,)), shape("b", (100,))]
    densities, scale, dense = proportional(specs, Target(0.5), lambda s: 1.0 if s.name == "a" else 0.1)
    assert densities == {"a": 1.0, "b": 0.25}
    assert scale == 2.5
    assert dense == {"a"}


def test_no_zeros_is_dense_everywhere(shape):
    specs = [shape("a", (50, 2)), shape("b", (10, 10))]
    densities, _, _ = proportional(specs, Target(0.0), lambda s: sum(s.shape) / s.numel)
    assert densities == {"a": 1.0, "b": pytest.approx(1.0)}


def test_nothing_free_is_nothing_to_share(shape):
    assert proportional([shape("a", (4, 4))], Target(0.5, forced={"a": 0.0}), lambda s: s.numel) == (
        {},
        0.0,
        frozenset(),
    )
