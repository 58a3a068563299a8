import pytest

from benchmarks import equal_latency
from benchmarks.cells import Cell
from benchmarks.tasks.comparison import DENSE
from fxsparse import Budget


def test_every_model_is_trained_dense_and_at_each_share_in_both_ways():
    grid = equal_latency.grid(2)
    assert len(grid) == 2 * (3 + 3 * 2 * 2)
    assert {s["share"] for s in grid if s["allocation"] == DENSE} == {1.0}


def test_priced_weights_share_one_budget_and_uniform_ones_keep_their_own():
    settings = {"share": 0.5, "steps": 100, "seed": 3}
    priced = equal_latency.plan_of(settings | {"allocation": "priced"})
    uniform = equal_latency.plan_of(settings | {"allocation": "uniform"})
    assert priced.budget == uniform.budget == Budget(latency=0.5)
    assert (priced.allocation, uniform.allocation) == ("global_magnitude", "uniform")
    assert (priced.method.rule.together, uniform.method.rule.together) == (True, False)


def test_the_table_has_paired_differences_to_uniform():
    def cell(how, seed, score):
        settings = {"model": "ViT", "share": 0.5, "allocation": how, "steps": 9, "seed": seed}
        return Cell(settings, {"score": score, "share": 0.51 + seed / 500, "sparsity": 0.9}, 1.0, {})

    cells = [
        cell(how, seed, score + seed)
        for how, score in (("uniform", 90.0), ("priced", 91.0))
        for seed in (0, 1)
    ]
    *_, uniform, priced = equal_latency.table(cells).splitlines()
    assert [part.strip() for part in uniform.split("|")[1:-1]] == [
        "ViT",
        "uniform",
        "0.50",
        "0.51",
        "90.0%",
        "90.50",
        "",
    ]
    assert [part.strip() for part in priced.split("|")[1:-1]][-2:] == ["91.50", "+1.00 ± 0.00"]


def test_a_model_is_trained_scored_and_timed(monkeypatch):
    settings = {"model": "MLP", "share": 0.5, "allocation": "uniform", "steps": 10, "seed": 0}
    result = equal_latency.measure(settings)
    assert 0 <= result["score"] <= 100
    assert result["share"] > 0
    assert result["sparsity"] == pytest.approx(0.6, abs=0.4)
