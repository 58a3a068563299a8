import pytest
import torch

from benchmarks.cells import Cell
from benchmarks.tasks.comparison import compare, paired, plan_of, read_method, run, settings_of, table
from benchmarks.tasks.digits import TASK
from fxsparse.pattern import Unstructured


def cell(method, seed, score, model="MLP", sparsity=0.9):
    settings = settings_of(TASK, model, method, sparsity, 400, seed)
    return Cell(settings, {"score": score, "step_ms": 5.0, "state_bytes": 2_000_000}, 1.0, {"threads": 1})


def test_paired_differences_and_their_standard_error():
    # Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt(3).
    of = paired([91, 92, 93], [90, 90, 90])
    assert of.mean == 2
    assert of.error == pytest.approx(3**-0.5)
    assert not of.equal
    assert paired([91, 89, 90.5], [90, 90, 90]).equal


def test_the_table_says_which_differences_exceed_two_standard_errors():
    pairs = {"rigl": (90, 90, 90), "set": (91, 92, 93), "static": (91, 89, 90.5)}
    cells = [cell(method, seed, score) for method, row in pairs.items() for seed, score in enumerate(row)]
    lines = table(TASK, cells, "rigl").splitlines()
    assert "difference to rigl" in lines[0]
    assert "+2.00 ± 0.58 (!)" in lines[3]
    assert "+0.17 ± 0.60 " in lines[4]
    assert "(!)" not in lines[4]
    assert [line.split("|")[4].strip() for line in lines[2:]] == ["90.00", "92.00", "90.17"]


def test_options_of_a_method_and_of_the_plan():
    text = "rigl:every=50,variant=torch,drop_fraction=0.2,allocation=uniform"
    plan = plan_of(settings_of(TASK, "MLP", text, 0.95, 400, 7))
    assert (plan.sparsity, plan.seed, plan.allocation, plan.storage) == (0.95, 7, "uniform", "masked")
    assert plan.pattern == Unstructured()
    assert plan.method.options == {"every": 50, "stop": 300, "variant": "torch", "drop_fraction": 0.2}


def test_schedules_end_at_three_quarters_unless_told_otherwise():
    schedules = [
        plan_of(settings_of(TASK, "MLP", text, 0.9, 400, 0)).method.schedule
        for text in ("set", "gmp", "set:stop=40")
    ]
    assert [(s.every, s.start, s.stop) for s in schedules] == [(20, 20, 300), (20, 0, 301), (20, 20, 40)]
    assert plan_of(settings_of(TASK, "MLP", "static", 0.9, 400, 0)).method.schedule is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("rigel", "expected one of dense, static, set, rigl"), ("rigl:every", "name:option=value")],
)
def test_a_method_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_method(text)


def test_the_same_settings_give_the_same_run():
    settings = settings_of(TASK, "MLP", "rigl", 0.9, 30, 3)
    (first, one), (second, other) = run(TASK, settings), run(TASK, settings)
    assert one["score"] == other["score"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_state_is_what_training_holds():
    _, dense = run(TASK, settings_of(TASK, "MLP", "dense", 0.0, 1, 0))
    _, masked = run(TASK, settings_of(TASK, "MLP", "static", 0.9, 1, 0))
    weights = 64 * 1024 + 1024 * 1024 + 1024 * 10
    entries = weights + 1024 + 1024 + 10
    step = 4 * 6  # one float a Parameter
    assert dense["state_bytes"] == 4 * 3 * entries + step
    assert (
        0 <= masked["state_bytes"] - dense["state_bytes"] - weights < 10_000
    )  # and a bool mask, and counters


def test_the_command_line_writes_cells_and_prints_the_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "digits.json"
    arguments = ["digits", "--quick", "--models", "MLP", "--methods", "static", "dense", "-o", str(path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--steps", "50"])
    monkeypatch.setattr("benchmarks.tasks.comparison.torch.set_num_threads", lambda _: None)
    compare(TASK)
    said = capsys.readouterr().out
    assert "2 of 2 cells to run" in said
    assert "| MLP     | 0%" in said
    assert len(path.read_text().splitlines()) == 4
