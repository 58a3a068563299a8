import itertools

import pytest

from benchmarks.cells import Cell
from benchmarks.gse_training import (
    DENSE,
    GRABO,
    GRAEST,
    GSE,
    LABELS,
    RIGL,
    RIGL_MASKED,
    SET,
    STATIC,
    TASKS,
    Watch,
    draw,
    grid_of,
    measure,
    table,
)
from benchmarks.tasks.comparison import plan_of, settings_of
from fxsparse.schedule import Schedule


def settings(method, seed=0, name="digits", steps=60, sparsity=0.95):
    model = "MLP" if name == "digits" else "transformer"
    return settings_of(TASKS[name], model, method, sparsity, steps, seed)


def cell(method, seed, score, name="digits", sparsity=0.95):
    result = {"score": score, "state_bytes": 1_000_000, "gradient_bytes": 500_000}
    result |= {"processor_ms": 2.0, "update_ms": None if method == STATIC else 9.0}
    return Cell(settings(method, seed, name, sparsity=sparsity), result, 1.0, {"threads": 1})


def test_the_main_rows_come_first_seed_by_seed():
    grid = [s for s in grid_of("digits", 5) if s["model"] == "ViT"]
    main, rest = grid[:85], grid[85:]
    assert [s["seed"] for s in main] == [seed for seed in range(5) for _ in range(17)]
    pairs = {(0.0, DENSE), *itertools.product((0.9, 0.95, 0.98, 0.99), (GSE, RIGL, SET, STATIC))}
    assert {(s["sparsity"], s["method"]) for s in main[:17]} == pairs
    assert [s["method"] for s in rest] == [RIGL_MASKED] * 4 + [GRABO, GRAEST] * 5
    assert len(grid_of("digits", 5)) == 2 * len(grid)


def test_all_methods_share_allocation_and_update_schedule():
    plans = [plan_of(settings(method, steps=400)) for method in LABELS if method != DENSE]
    assert {plan.allocation for plan in plans} == {"er_unrolled"}
    moving = [plan.method.schedule for plan in plans if plan.method.schedule]
    assert len(moving) == len(plans) - 1
    assert len({(s.every, s.stop, s.skip_step, s.drop_fraction) for s in moving}) == 1
    assert {step for s in moving for step in s.updates(400) if step} == set(range(20, 300, 20))


def test_an_update_is_timed_apart_and_gradients_are_counted():
    found = {method: measure(settings(method)) for method in (GSE, STATIC, DENSE, RIGL_MASKED)}
    assert found[GSE]["update_ms"] > 2 * found[GSE]["processor_ms"] > 0
    assert found[STATIC]["update_ms"] is None
    dense = 4 * sum(p.numel() for p in TASKS["digits"].models["MLP"]().parameters())
    assert found[DENSE]["gradient_bytes"] == found[RIGL_MASKED]["gradient_bytes"] == dense
    assert found[GSE]["gradient_bytes"] < dense / 10


def test_an_update_in_the_place_of_a_step_is_the_next_one():
    watch = Watch(seconds=[0, 1, 2, 12, 13])
    beside, instead = (Schedule(2, 3, start=2, skip_step=skip) for skip in (False, True))
    assert watch.found(beside) == {"processor_ms": 1000, "update_ms": 1000, "gradient_bytes": 0}
    assert watch.found(instead) == {"processor_ms": 1000, "update_ms": 10_000, "gradient_bytes": 0}
    assert watch.found(Schedule(1, start=1))["processor_ms"] is None


@pytest.mark.parametrize(
    ("name", "verdicts"), [("digits", ("better", "**worse**")), ("bytes", ("**worse**", "better"))]
)
def test_the_table_says_which_differences_exceed_two_errors(name, verdicts):
    rows = {
        GSE: (91, 92, 93, 91, 93),
        RIGL: [90] * 5,
        GRABO: (91, 89, 90.5, 90, 90),
        SET: (89, 88, 87, 89, 87),
    }
    cells = [
        cell(method, seed, score, name) for method, row in rows.items() for seed, score in enumerate(row)
    ]
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in table(cells).splitlines()]
    found = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert [row["method"] for row in found] == ["GSE", "GSE, GraBo", "RigL", "SET"]
    assert [row["beyond 2 errors"] for row in found] == [verdicts[0], "", "", verdicts[1]]
    assert [row["difference to RigL"][:4] for row in found] == ["+2.0", "+0.1", "", "-2.0"]
    assert {(row["seeds"], row["memory (MB)"]) for row in found} == {("5", "1.50")}


def test_a_seed_that_rigl_lacks_is_left_out_of_the_difference():
    rows = {GSE: (91, 93, 0), RIGL: (90, 90)}
    cells = [cell(method, seed, score) for method, row in rows.items() for seed, score in enumerate(row)]
    assert "+2.00 ± 1.00" in table(cells)
    assert "few seeds" in table(cells)


def test_the_figure_is_drawn(tmp_path):
    rows = itertools.product((GSE, RIGL, SET, STATIC, DENSE), range(2))
    cells = [cell(method, seed, 90 + seed, sparsity=0.0 if method == DENSE else 0.9) for method, seed in rows]
    draw(cells, tmp_path / "gse.png")
    assert (tmp_path / "gse.png").read_bytes().startswith(b"\x89PNG")
