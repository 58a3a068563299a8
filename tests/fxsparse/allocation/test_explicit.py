import pytest

from fxsparse.allocation import Target
from fxsparse.allocation.explicit import Explicit
from fxsparse.errors import PlanError


def test_floats_are_sparsities_and_ints_are_counts(shape):
    specs = [shape("a.weight", (10, 10)), shape("b.weight", (10, 10)), shape("c.weight", (10, 10))]
    assert Explicit({"a": 0.75, "b*": 7})(specs, Target(0.9)) == {
        "a.weight": 25,
        "b.weight": 7,
        "c.weight": 10,
    }


def test_the_first_glob_decides_and_an_override_goes_before_it(shape):
    specs = [shape("a", (10, 10)), shape("b", (10, 10)), shape("c", (10, 10))]
    table = Explicit({"a": 0.5, "*": 0.8})
    assert table(specs, Target(0.9, forced={"c": 0.0})) == {"a": 50, "b": 20, "c": 100}


def test_a_glob_that_names_nothing_is_refused(shape):
    with pytest.raises(PlanError, match="'encoder' names none of a"):
        Explicit({"encoder": 0.5})([shape("a", (10, 10))], Target(0.9))


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ({"a": 1.0}, r"allocation\['a'\]: expected a sparsity in \[0, 1\), got 1.0"),
        ({"a": -0.1}, r"got -0.1"),
        ({"a": 0}, "write 0.0 for a dense weight"),
        ({"a": "0.5"}, "expected {glob: sparsity or nnz}, got 'a': '0.5'"),
        ({"a": True}, "got 'a': True"),
        ({3: 0.5}, "got 3: 0.5"),
    ],
)
def test_a_bad_value_is_refused_at_construction(table, part):
    with pytest.raises(PlanError, match=part):
        Explicit(table)
