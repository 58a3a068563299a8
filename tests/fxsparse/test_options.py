import pytest

from fxsparse.errors import PlanError
from fxsparse.options import (
    check_flag,
    check_integer,
    check_number,
    check_one_of,
    check_positive,
    check_share,
    check_steps,
)


def test_values_in_range_pass():
    check_flag("x", False)
    check_integer("n", 3, 3)
    check_steps("n", 0, 0)
    check_number("x", -1.5, -1.5)
    check_positive("x", 1e-30)
    check_share("x", 0)
    check_one_of("x", "a", {"a": 1})


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_flag("x", 1), "expected x as True or False, got 1."),
        (lambda: check_integer("n", 2, 3), "expected n as an integer >= 3, got 2."),
        (lambda: check_integer("n", 3.0, 3), "expected n as an integer >= 3, got 3.0."),
        (lambda: check_integer("n", True, 0), "expected n as an integer >= 0, got True."),
        (lambda: check_steps("n", "a", 1), "expected n as a number of optimizer steps, at least 1, got 'a'."),
        (lambda: check_number("x", -0.1, 0), "expected x as a number >= 0, got -0.1."),
        (lambda: check_number("x", float("inf"), 0), "expected x as a number >= 0, got inf."),
        (
            lambda: check_positive("x", 0, "Two is usual."),
            "expected x as a number above 0, got 0. Two is usual.",
        ),
        (lambda: check_positive("x", True), "expected x as a number above 0, got True."),
        (lambda: check_share("x", 1.0), "expected x as a share from 0 to below 1, got 1.0."),
        (lambda: check_share("x", float("nan")), "expected x as a share from 0 to below 1, got nan."),
        (lambda: check_one_of("x", ["a"], ("a", "b")), "expected x as one of a, b, got ['a']."),
    ],
)
def test_others_are_refused_by_name(check, message):
    with pytest.raises(PlanError) as raised:
        check()
    assert str(raised.value) == message
