import json

import pytest

from benchmarks.cells import environments, read_cells, run_cells

GRID = [{"model": name, "sizes": (1, 2)} for name in ("a", "b", "c")]


def test_cells_in_the_file_are_not_measured_again(tmp_path, capsys):
    path, seen = tmp_path / "cells.json", []

    def measure(settings):
        seen.append(settings["model"])
        return {"score": len(seen)}

    first = run_cells(GRID[:2], measure, path, seconds=30)
    again = run_cells(GRID[::-1], measure, path)
    assert seen == ["a", "b", "c"]
    assert [cell.result["score"] for cell in again] == [3, 2, 1]
    assert again[1:] == first[::-1]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 of 2 cells to run, about 1.0 min at 30 s a cell"
    assert said[1].startswith("1 of 3 cells to run, about ")  # at what the first two took


def test_a_killed_run_keeps_what_was_finished(tmp_path):
    path = tmp_path / "cells.json"

    def measure(settings):
        if settings["model"] == "c":
            raise KeyboardInterrupt
        return {"score": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run_cells(GRID, measure, path)
    assert [cell.settings["model"] for cell in read_cells(path)] == ["a", "b"]
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written beside it


def test_cells_of_other_grids_stay_in_the_file(tmp_path):
    path = tmp_path / "cells.json"
    run_cells(GRID[:1], lambda _: {}, path)
    run_cells(GRID[1:], lambda _: {}, path)
    assert len(read_cells(path)) == 3
    assert len(path.read_text().splitlines()) == 5  # one line a cell


def test_the_environment_is_kept_with_each_cell():
    cells = run_cells(GRID, lambda _: {})
    assert set(cells[0].environment) == {"processor", "threads", "torch", "python"}
    assert environments(cells).count("\n") == 0


def test_without_an_estimate_the_first_cell_gives_it(capsys):
    run_cells(GRID, lambda _: {})
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "3 of 3 cells to run"
    assert said[1].startswith("2 of 3 cells to run, about ")


@pytest.mark.parametrize("text", ["", "[]", '{"cells": [{"model": 1}]}', json.dumps({"runs": []})])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "cells.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cells\.json: expected a JSON file of cells"):
        run_cells(GRID, lambda _: {}, path)
    assert path.read_text() == text


@pytest.mark.parametrize("result", [{"score": float("nan")}, {"score": object()}])
def test_results_are_plain_numbers(result):
    with pytest.raises(ValueError, match="expected plain JSON values in a cell"):
        run_cells(GRID, lambda _: result)


def test_an_estimate_of_every_cell_counts_before_what_cells_took(tmp_path, capsys):
    path, costs = tmp_path / "cells.json", {"a": 600, "b": 120, "c": 60}
    run_cells(GRID[:1], lambda _: {}, path)
    run_cells(GRID, lambda _: {}, path, seconds=lambda settings: costs[settings["model"]])
    assert "2 of 3 cells to run, about 3.0 min at 90 s a cell" in capsys.readouterr().out
