import itertools
from dataclasses import replace

import pytest

import fxsparse
from benchmarks import all_methods
from benchmarks.all_methods import (
    DENSE,
    SPARSITIES,
    TASKS,
    ActiveCounts,
    grid_of,
    measure,
    rows_at,
    train_ratio,
)
from benchmarks.tasks.comparison import run, settings_of
from benchmarks.tasks.every_method import ONE_SHOT, PATTERNS, ROWS, Recipe, options_of, plan_of, recipe_of
from fxsparse.methods import METHODS
from fxsparse.storage import MaskedWeight


def settings(row, sparsity=0.9, steps=400, model="CNN"):
    return settings_of(TASKS["digits"], model, row, sparsity, steps, 0)


def plan(row, sparsity=0.9, steps=400):
    model = TASKS["digits"].models["CNN"]()
    return plan_of(row, recipe_of(model, steps, 3e-3, sparsity), 0, model)


def test_every_method_has_a_row_and_a_plan_at_both_sparsities():
    assert {method.__name__.rstrip("_") for method in METHODS} <= set(ROWS)
    for level, steps in itertools.product(SPARSITIES, (300, 400)):
        for row, sparsity in rows_at(level):
            if row == DENSE:
                continue
            made = plan(row, sparsity, steps)
            assert (made.sparsity, made.storage) == (sparsity, "masked")
            assert made.allocation == ("uniform" if row in PATTERNS else "erk")
            schedule = made.method.schedule
            if schedule is not None and schedule.every > 1:
                assert schedule.every == 20
                assert max(schedule.updates(steps)) <= 0.75 * steps or row == "mest"


def test_ramps_take_the_share_of_the_paper():
    recipe = Recipe(steps=400, rate=3e-3, sparsity=0.98, bound=0.1)
    assert options_of("gmp", recipe) == {"every": 20, "start": 120, "stop": 300}
    assert options_of("granet", recipe) == {"every": 20, "stop": 300, "ramp": 200}
    assert options_of("movement", recipe)["score_lr"] == pytest.approx(450)
    assert options_of("mst", recipe)["levels"] == [0.5, 0.99]
    assert options_of("magnitude, one-shot", recipe) == {"score": "magnitude"}
    assert options_of("static", recipe) == {}
    assert options_of("cht", recipe) == {"every": 20, "steps": 300, "decay": "cosine"}


def test_spartans_sharpness_is_for_how_far_weights_get():
    """As sharp as the paper's 20 where weights get to 1 / 0.3: at 10 after 200 steps masks hardly let a signal by."""
    for steps, rate in ((200, 3e-3), (400, 3e-3), (200, 2e-2)):
        found = options_of("spartan", Recipe(steps=steps, rate=rate, sparsity=0.98, bound=0.1))
        assert found == {"steps": steps, "beta": pytest.approx(20 / 0.3 / (steps * rate / 2))}
    assert plan("spartan", 0.98, steps=200).method.rule.sharpness.most == pytest.approx(222.2, abs=0.1)


def test_top_kast_takes_its_sets_anew_at_every_step_to_the_end():
    schedule = plan("top_kast", steps=200).method.schedule
    assert list(schedule.updates(200)) == list(range(1, 200))


def test_cells_come_seed_by_seed_and_90_percent_first():
    grid = grid_of("digits", 2)
    half = len(grid) // 2
    assert [s["seed"] for s in grid] == [0] * half + [1] * half
    levels = [s["sparsity"] for s in grid[:half]]
    assert 0.98 not in levels[: levels.index(0.98)]
    assert {0.9, 0.5, 0.0} == set(levels[: levels.index(0.98)])
    assert {0.98} == set(levels[levels.index(0.98) :])
    assert len(grid) == 2 * 2 * (1 + 2 * (len(ROWS) - len(PATTERNS)) + len(PATTERNS))


def test_flops_are_of_the_whole_training():
    """Dense to step 200 of 400 and 90 % after it; a counter that stops at the schedule's end would say dense."""
    of = {row: train_ratio(settings(row), plan(row)) for row in ("static", "hypersparse", "rigl")}
    assert of["hypersparse"] == pytest.approx((1 + of["static"]) / 2, rel=0.02)
    share = 15 / 400  # a dense weight gradient, a third of a step, at 0, 20, ..., 280
    assert of["rigl"] == pytest.approx(of["static"] + share * (1 - of["static"]) / 3, rel=1e-6)


@pytest.mark.parametrize("row", ["rigl", "s_ste", "wanda"])
def test_a_cell(row):
    of = settings(row, 0.5 if row in PATTERNS else 0.9, steps=2)
    found = measure(of)
    if row in ONE_SHOT:
        assert found["train_ratio"] == 1
    assert found["exact"]
    assert found["zeros"] == pytest.approx(of["sparsity"], abs=0.01)
    assert found["update_ms"] is None if row == "wanda" else found["update_ms"] > 0
    model = TASKS["digits"].models["CNN"]()
    assert found["gradient_bytes"] == 4 * sum(p.numel() for p in model.parameters())


def test_a_count_that_is_not_the_plans_is_an_error(monkeypatch):
    def tampered(task, of, watch, plan):
        model = fxsparse.compile(task.models["CNN"](), plan, example_inputs=all_methods._inputs(of))
        for _, weight in model.weights():
            assert isinstance(weight, MaskedWeight)
            weight.mask[0] = False
        return model, {}

    monkeypatch.setattr(all_methods, "run", tampered)
    with pytest.raises(ValueError, match=r"static: expected \d+ nonzeros after 2 steps, got \d+"):
        measure(settings("static", steps=2))


def test_the_command_line_shows_finished_cells_and_draws(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cells.json"
    monkeypatch.setitem(all_methods.MODELS, "digits", ("CNN",))
    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], steps=2))
    monkeypatch.setattr(all_methods, "ROWS", ("static",))
    monkeypatch.setattr(all_methods, "PATTERNS", {})
    monkeypatch.setattr(all_methods.torch, "set_num_threads", lambda _: None)
    arguments = ["all_methods", "--tasks", "digits", "--seeds", "1", "-o", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    all_methods.main()
    assert "3 of 3 cells to run, about " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments, "--finished", "--figure", str(tmp_path / "all.png")])
    all_methods.main()
    assert "3 of 3 cells are finished" in capsys.readouterr().out
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_flops_of_learned_counts_are_of_the_entries_that_were_active():
    of, made, seen = settings("static", steps=1), plan("static"), ActiveCounts()
    run(TASKS["digits"], of, seen.attach, made)
    found = train_ratio(of, replace(made, allocation=seen.means()))
    assert found == train_ratio(of, made)
    learned = measure(settings("str", steps=2))
    assert not learned["exact"]
    assert learned["train_ratio"] != pytest.approx(
        train_ratio(settings("str", steps=2), plan("str", steps=2))
    )
