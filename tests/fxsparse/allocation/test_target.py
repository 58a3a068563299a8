import pytest

from fxsparse.allocation import Target
from fxsparse.allocation.target import count
from fxsparse.errors import PlanError


def test_counts_read_the_sparsity_as_it_was_written():
    assert int(1000 * (1 - 0.9)) == 99
    assert count(1000, 0.9) == 100
    assert count(10, 0.99) == 0


def test_forced_and_free_split(shape):
    specs = [shape("b", (10, 10)), shape("a", (10, 10)), shape("c", (4, 5))]
    target = Target(0.9, forced={"c": 0.0})
    assert [s.name for s in target.free(specs)] == ["a", "b"]
    assert target.forced_counts(specs) == {"c": 20}
    assert target.free_total(specs) == 20


def test_keep_dense_counts_makes_the_others_pay_for_forced_and_excluded(shape):
    # 220 entries in specs and 30 excluded: a quarter of 250 is 62, less 20 forced and 30 excluded is 12.
    specs = [shape("a", (10, 20)), shape("c", (4, 5))]
    target = Target(0.75, forced={"c": 0.0}, keep_dense_counts=True, excluded_numel=30)
    assert target.free_total(specs) == 12
    assert target.free_sparsity(specs) == 1 - 12 / 200


def test_an_infeasible_total_names_both_bounds(shape):
    with pytest.raises(PlanError, match=r"leaves 0 nonzeros for 2 weights; expected 2 .* to 200"):
        Target(0.999).free_total([shape("a", (10, 10)), shape("b", (10, 10))])


def test_dense_weights_that_eat_the_budget_are_refused(shape):
    specs = [shape("a", (10, 10)), shape("b", (10, 10))]
    with pytest.raises(PlanError, match=r"-80 nonzeros .* once the weights with a fixed count are paid for"):
        Target(0.9, forced={"a": 0.0}, keep_dense_counts=True).free_total(specs)


@pytest.mark.parametrize(
    ("wish", "got"), [(0.999, "0 from sparsity 0.999"), (101, "101 from nnz 101"), (0, "0 from nnz 0")]
)
def test_a_forced_count_outside_the_weight_is_refused(shape, wish, got):
    with pytest.raises(PlanError, match=f"weight 'a'.* got {got}.*smallest feasible density is 0.01"):
        Target(0.5, forced={"a": wish}).forced_counts([shape("a", (10, 10))])
