"""The grid, a small cell and the tables of benchmarks.inference."""

import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import inference as bench
from benchmarks.cells import Cell, read_cells, run_cells
from benchmarks.inference_tables import artefact_row, draw, time_row
from benchmarks.models.published import WHOLE, linear
from benchmarks.rivals import TORCH

RIVALS = ("eager", "ours", "MKL CSR", "ONNX Runtime")
RESULTS = Path(bench.__file__).parent / "results"
TINY = {"model": "tiny", "sparsity": 0.9, "batch": 2, "threads": 1, "rivals": RIVALS}


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setitem(bench.MODELS, "tiny", linear(96, 64))
    monkeypatch.setattr(bench, "SECONDS", 0.01)


def cell(model="768x3072", sparsity=0.9, batch=1, threads=1, **us):
    settings = {"model": model, "sparsity": sparsity, "batch": batch, "threads": threads, "rivals": list(us)}
    times = {name.replace("_", " "): [least, least, 2 * least, 3 * least] for name, least in us.items()}
    ratios = {name: t[2] / times["ours"][2] for name, t in times.items() if name != "ours"}
    return Cell(
        settings,
        {
            "us": times,
            "rounds": 15,
            "ratios": ratios | ({"compiled, both": 0.97} if "compiled" in us else {}),
            "errors": {"ours": 3e-7},
            "seconds": {"ours": 1.23},
            "peak_bytes": {"eager": 2_000_000, "ours": 1_000_000},
            "share": 0.875,
            "kernels": {"cpu-csr": 3, "dense": 1},
            "bytes": {"dense": 40_000_000, "sparse": 6_000_000},
            "notes": [],
        },
        1.0,
        {"torch": "2"},
    )


def test_the_grid_has_every_cell_once_and_the_headline_first():
    models = list(bench.MODELS)
    cells = bench.grid(models, deepsparse=True)
    assert len({str(c) for c in cells}) == len(cells) == 2 * (3 * 3 * 8 + 6 * 2 * 5) + 6 * 3
    first = cells[: len(models)]
    assert [c["model"] for c in first] == models
    assert {(c["sparsity"], c["batch"], c["threads"]) for c in first} == {(0.9, 1, 1)}
    assert [("MKL CSR" in c["rivals"], "DeepSparse" in c["rivals"]) for c in first] == [(True, True)] * 3 + [
        (False, True)
    ] * 6
    large = [c for c in cells if c["batch"] == 64]
    assert {(c["model"], c["sparsity"]) for c in large} == {(m, s) for m in WHOLE for s in (0.0, 0.5, 0.9)}
    assert all(c["rivals"] == list(TORCH) and c["threads"] == 1 for c in large)
    assert len(bench.grid(models, deepsparse=False, quick=True)) == 3
    assert not any("DeepSparse" in c["rivals"] for c in bench.grid(models, deepsparse=False))


@pytest.mark.usefixtures("_tiny")
def test_a_cell_has_the_times_errors_and_sizes_of_every_rival_and_runs_once(tmp_path):
    path = tmp_path / "cells.json"
    (found,) = run_cells([TINY], bench.measure, path, seconds=bench.expected_seconds)
    result = found.result
    assert set(result["us"]) == set(RIVALS)
    assert set(result["ratios"]) == set(RIVALS) - {"ours"}
    assert set(result["errors"]) == set(RIVALS) - {"eager"}
    assert max(result["errors"].values()) < 1e-5
    assert result["rounds"] >= 15
    assert sum(result["kernels"].values()) == 1
    assert result["share"] == (0.0 if "dense" in result["kernels"] else 1.0)
    assert result["bytes"]["dense"] == 96 * 64 * 4
    assert set(result["peak_bytes"]) == {"eager", "ours"}
    run_cells([TINY], lambda _: pytest.fail("measured again"), path)


@pytest.mark.usefixtures("_tiny")
def test_without_zeros_nothing_is_called_sparse():
    result = bench.measure(TINY | {"sparsity": 0.0, "rivals": ("eager", "ours")})
    assert result["share"] is None
    assert result["kernels"] == {"dense": 1}


def test_turns_of_deepsparse_are_by_its_own_clock():
    class Engine:
        def microseconds(self, runs):
            return 1e6 * runs

    made = bench.Rivals({"ours": lambda: torch.zeros(1)}, None, Engine())
    samples = bench._turns(made, 3, {"ours": 2, "DeepSparse": 5})
    assert samples["DeepSparse"] == [5e6] * 3
    assert len(samples["ours"]) == 3


def test_calls_that_take_long_have_five_turns_after_one_to_warm_up(monkeypatch):
    class Engine:
        def microseconds(self, runs):
            return 1.0

    calls = []
    monkeypatch.setattr(bench, "LONGEST", 0.0)
    samples = bench._samples(bench.Rivals({"ours": lambda: calls.append(1)}, None, Engine()))
    assert {name: len(values) for name, values in samples.items()} == {"ours": 5, "DeepSparse": 5}
    assert len(calls) == 1 + 2 + 3 * 20  # calls this short are up to 20 in a row


def test_rows_have_ratios_by_least_times_and_by_turns_and_keep_losses():
    row = time_row(cell(eager=8000.0, ours=2000.0, compiled=1000.0, ours_compiled=500.0, DeepSparse=4000.0))
    assert (row["eager"], row["ours"], row["MKL CSR"]) == ("8", "2", "-")
    assert (row["of eager"], row["of compiled"], row["of DeepSparse"]) == (
        "4.00x (4.00x)",
        "0.50x (0.50x)",
        "2.00x (2.00x)",
    )
    assert row["of compiled, both"] == "2.00x (0.97x)"
    assert row["of ONNX Runtime"] == "-"


def test_the_artefact_row_says_what_is_sparse():
    row = artefact_row(cell(eager=8.0, ours=2.0))
    assert (row["in sparse kernels"], row["kernels"]) == ("88%", "3 cpu-csr, 1 dense")
    assert row["weights (MB)"] == "6.0 of 40.0"
    assert row["largest error"] == "3e-07"


def test_finished_cells_are_shown_and_none_is_run(tmp_path, monkeypatch, capsys):
    path, figure = tmp_path / "cells.json", tmp_path / "figure.png"
    settings = bench.grid(["768x3072"], deepsparse=False)[0]
    run_cells([settings], lambda _: cell(eager=8.0, ours=2.0).result, path)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("a cell ran"))
    command = f"inference --models 768x3072 --finished -o {path} --figure {figure}"
    monkeypatch.delenv("FXSPARSE_DEEPSPARSE_PYTHON", raising=False)
    monkeypatch.setattr(sys, "argv", command.split())
    bench.main()
    said = capsys.readouterr().out
    assert "1 of 48 cells are finished" in said
    assert "4.00x (4.00x)" in said
    assert "DeepSparse: not measured" in said
    assert figure.stat().st_size > 1000
    assert len(read_cells(path)) == 1


def test_the_figure_has_a_panel_for_each_model(tmp_path):
    cells = [
        cell(model, sparsity, eager=8.0, ours=2.0)
        for model in ("a", "b", "c", "d")
        for sparsity in (0.0, 0.9)
    ]
    draw(cells, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_name_no_folder_of_a_machine(path):
    assert bench._INSTALLED.sub("(", "(/home/me/lib/site-packages/torch/x.py:1)") == "(torch/x.py:1)"
    assert not re.search(r"/(home|root|tmp|opt|usr|Users)/|site-packages", path.read_text())
