"""The grid, one cell of each transformation, the table by hand and the figure."""

from dataclasses import replace

import pytest

from benchmarks.cells import Cell
from benchmarks.sparse_ift import (
    DENSE,
    EXPERIMENTS,
    RIGL,
    STATIC,
    TRANSFORMS,
    draw,
    experiment_of,
    grid_of,
    measure,
    method_of,
    spectra,
    table,
)
from benchmarks.tasks.comparison import plan_of, settings_of
from fxsparse.transforms import SparseDoped

CNN, BYTES = EXPERIMENTS["CNN"], EXPERIMENTS["bytes"]


def settings(of, method, seed=0, sparsity=0.75, steps=2):
    return settings_of(of.task, of.model, method, sparsity, steps, seed)


def cell(of, method, seed, score, sparsity=0.75):
    result = {"score": score, "step_ms": 2.0, "state_bytes": 1000}
    if method != DENSE:
        result |= {"layers_ratio": 1.0, "model_ratio": 1.25, "sparsity": sparsity, "ramanujan_gap": -3.0}
    return Cell(settings(of, method, seed, 0.0 if method == DENSE else sparsity), result, 1.0, {"threads": 1})


def test_the_grid_is_seed_by_seed_with_every_pair():
    grid = grid_of(list(EXPERIMENTS.values()))
    seeds = [s["seed"] for s in grid]
    assert seeds == sorted(seeds)
    of_first = [s for s in grid if s["seed"] == 0]
    assert len(of_first) == 2 * (1 + 3 * 8) + (1 + 8)
    assert {s["model"] for s in grid if s["seed"] > 2} == {"CNN", "ViT"}
    methods = {(s["model"], s["sparsity"], s["method"]) for s in of_first}
    assert len(methods) == len(of_first)
    assert {s["sparsity"] for s in of_first if s["model"] == "transformer"} == {0.0, 0.75}


def test_dense_and_sparse_share_rate_steps_and_data():
    for of in EXPERIMENTS.values():
        assert len(set(of.task.rates)) == 1
        rows = [s for s in grid_of([of]) if s["seed"] == 1]
        assert len({(s["steps"], s["task"]) for s in rows}) == 1


def test_a_plan_has_its_transform_and_a_uniform_allocation():
    plan = plan_of(settings(CNN, method_of(RIGL, "sparse-doped"), steps=100))
    assert plan.transform == SparseDoped()
    assert (plan.allocation, plan.storage, plan.sparsity) == ("uniform", "compact", 0.75)
    assert [step for step in plan.method.schedule.updates(100) if step] == list(range(5, 60, 5))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_cell_trains_at_equal_flops(transform):
    found = measure(settings(CNN, method_of(STATIC, transform)))
    assert found["layers_ratio"] == pytest.approx(1, abs=2e-3)
    assert 0.999 < found["model_ratio"] < 1.05
    assert found["ramanujan_gap"] == pytest.approx(found["ramanujan_gap"])
    assert 0 < found["score"] < 100


def test_a_dense_cell_has_a_score_only():
    assert "layers_ratio" not in measure(settings(CNN, DENSE, sparsity=0.0))


@pytest.mark.parametrize(
    ("of", "verdicts"), [(CNN, ["better", "**worse**"]), (BYTES, ["**worse**", "better"])]
)
def test_the_table_compares_with_dense_and_with_static(of, verdicts):
    wide, doped = (method_of(RIGL, name) for name in ("sparse-wide", "sparse-doped"))
    rows = {
        DENSE: (90, 90, 90),
        wide: (92, 91, 92),
        method_of(STATIC, "sparse-wide"): (90, 90, 90),
        doped: (88, 89, 88),
    }
    cells = [cell(of, method, seed, score) for method, row in rows.items() for seed, score in enumerate(row)]
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in table(cells).splitlines()]
    found = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert [(row["transformation"], row["masks"]) for row in found] == [
        ("dense", ""),
        ("sparse-wide", STATIC),
        ("sparse-wide", RIGL),
        ("sparse-doped", RIGL),
    ]
    assert [row["beyond 2 errors"] for row in found] == ["", "", *verdicts]
    assert found[2]["difference to dense"].startswith("+1.67 ± 0.33" if of is CNN else "+1.667 ± 0.333")
    assert found[2]["RigL - static"] == found[2]["difference to dense"]
    assert found[3]["RigL - static"] == found[1]["RigL - static"] == ""
    assert found[2]["FLOPs of layers / model"] == "1.00 / 1.25"


def test_a_seed_that_dense_lacks_is_left_out():
    wide = method_of(RIGL, "sparse-wide")
    cells = [cell(CNN, DENSE, 1, 90), cell(CNN, DENSE, 2, 90)]
    cells += [cell(CNN, wide, seed, score) for seed, score in enumerate((0, 92, 92.5))]
    printed = table(cells)
    assert "+2.25 ± 0.25" in printed
    assert "better" not in printed  # two seeds are too few to say so


def test_experiments_are_told_apart_by_their_model():
    assert [experiment_of({"model": of.model}) for of in EXPERIMENTS.values()] == list(EXPERIMENTS.values())


def test_the_figure_is_drawn(tmp_path):
    methods = [DENSE, *(method_of(name, t) for name in (STATIC, RIGL) for t in TRANSFORMS)]
    cells = [cell(of, m, seed, 90 + seed) for of in (CNN, BYTES) for m in methods for seed in range(2)]
    draw(cells, tmp_path / "ift.png")
    assert (tmp_path / "ift.png").read_bytes().startswith(b"\x89PNG")


def test_spectra_are_shown_before_and_after_training():
    lines = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in spectra(replace(CNN, sparsities=(0.75,)), 8).splitlines()
    ]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert [(row["transformation"], row["step"]) for row in rows] == [
        (name, step) for name in TRANSFORMS for step in ("0", "8")
    ]
    assert {row["zeros"] for row in rows} == {"75%"}
    moved = [a["Ramanujan gap"] != b["Ramanujan gap"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert all(moved)
    assert all(row["full spectrum"] != "—" for row in rows)
