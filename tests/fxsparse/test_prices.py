import pytest

from fxsparse.errors import PlanError
from fxsparse.prices import Price, Prices


def test_a_price_is_a_line_between_its_points():
    price = Price(((0, 10.0), (100, 20.0), (200, 100.0)))
    assert [price(nnz) for nnz in (0, 50, 100, 150, 200, 300)] == [10, 15, 20, 60, 100, 100]
    assert price.entry == pytest.approx(0.45)
    assert Price(((5, 3.0),))(7) == 3.0


def test_the_least_sparsity_that_is_paid_for():
    prices = Prices({"w": Price(((0, 0.0), (1000, 1000.0)))}, "us", dense=1500, rest=500, share=0.5)
    sparsity, counts = prices.sparsest(lambda s: {"w": round(1000 * (1 - s))}, 0.999)
    assert (sparsity, counts) == (pytest.approx(0.75, abs=1e-3), {"w": 250})
    assert prices.cost(counts) == 750


def test_nothing_is_pruned_where_the_dense_model_can_be_paid():
    prices = Prices({"w": Price(((0, 0.0), (10, 10.0)))}, "us", dense=10, rest=0, share=1.0)
    assert prices.sparsest(lambda s: {"w": round(10 * (1 - s))}, 0.9) == (0.0, {"w": 10})


def test_what_cannot_be_paid_is_refused_with_the_numbers():
    prices = Prices({"w": Price(((0, 5.0), (10, 10.0)))}, "us", dense=20, rest=10, share=0.5)
    with pytest.raises(
        PlanError, match=r"0.5 of the dense model are 10 us, but at sparsity 0.9 it still costs 15.5 us"
    ):
        prices.sparsest(lambda s: {"w": round(10 * (1 - s))}, 0.9)


def test_costs_of_entries_are_one_on_average():
    prices = Prices(
        {"a": Price(((0, 0.0), (10, 40.0))), "b": Price(((0, 5.0), (30, 5.0 + 30)))}, "us", 80, 0, 0.5
    )
    costs = prices.per_entry()
    assert costs["a"] / costs["b"] == pytest.approx(4)
    assert 10 * costs["a"] + 30 * costs["b"] == pytest.approx(40)
