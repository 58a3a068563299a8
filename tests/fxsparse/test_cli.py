import json

import pytest
import torch

import fxsparse
import fxsparse.demo.models
from fxsparse import cli

SMALL = ["fxsparse.demo.models:mlp", "--input", "2x1x8x8"]


def run(capsys, *words):
    """(exit code, stdout, stderr) of one command."""
    code = cli.main(words)
    out, err = capsys.readouterr()
    return code, out, err


def test_trace_prints_the_front_end_and_the_graph(capsys):
    code, out, err = run(capsys, "trace", *SMALL)
    assert (code, err) == (0, "")
    assert out.startswith("captured by the symbolic front end")
    assert "def forward" in out


def test_trace_prints_a_graph_once_where_both_modes_share_it(capsys, tmp_path, monkeypatch):
    _, shared, _ = run(capsys, "trace", *SMALL)
    assert shared.count("def forward") == shared.count("\ntrain and eval:\n") == 1
    functional = "lambda self, x: nn.functional.dropout(x, training=self.training)"
    source = f"from torch import nn\nclass Drop(nn.Module):\n    forward = {functional}\n"
    (tmp_path / "drop_in_two_modes.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    _, apart, _ = run(capsys, "trace", "drop_in_two_modes:Drop", "--input", "2x2")
    assert apart.count("def forward") == apart.count("\ntrain:\n") + apart.count("\neval:\n") == 2


def test_trace_as_json_has_tier_notes_and_graphs(capsys):
    _, out, _ = run(capsys, "trace", *SMALL, "--format", "json")
    row = json.loads(out)
    assert row["tier"] == "symbolic"
    assert set(row["graphs"]) == {"train", "eval"}


def test_plan_counts_every_nonzero(capsys):
    _, out, _ = run(capsys, "plan", *SMALL, "--sparsity", "0.9", "--format", "json")
    row = json.loads(out)
    numel = 64 * 1024 + 1024 * 1024 + 1024 * 10
    assert row["totals"]["numel"] == numel
    assert row["totals"]["nnz"] == sum(layer["nnz"] for layer in row["layers"]) == numel // 10


def test_plan_transforms_the_model_first(capsys):
    words = ("--sparsity", "0.75", "--transform", "sparse-wide", "--format", "json")
    _, out, _ = run(capsys, "plan", *SMALL, *words)
    row = json.loads(out)
    [layer] = row["layers"]
    assert (layer["shape"], layer["nnz"]) == ([2048, 2048], 1024 * 1024)
    assert row["totals"]["layers_ratio"] == 1
    assert row["totals"]["model_ratio"] > 1


def test_report_names_the_passes_that_ran(capsys):
    _, out, _ = run(capsys, "report", *SMALL, "--plan", "rigl-90", "--format", "json")
    row = json.loads(out)
    assert "allocate-nnz" in [p["name"] for p in row["passes"]]
    assert [layer["storage"] for layer in row["layers"]] != []


@pytest.mark.parametrize(
    ("form", "start"), [("table", "kernel"), ("markdown", "| kernel"), ("html", "<table>"), ("json", "[")]
)
def test_kernels_lists_what_runs_here(capsys, form, start):
    code, out, _ = run(capsys, "kernels", "--format", form)
    assert code == 0
    assert out.startswith(start)
    assert "csr" in out


def test_bench_times_the_pruned_model(capsys):
    _, out, _ = run(capsys, "bench", *SMALL, "--sparsity", "0.95", "--format", "json")
    row = json.loads(out)
    assert all(layer["dense_us"] > 0 for layer in row["layers"] if layer["sparsity"])
    assert any("dense" in note and "us" in note for note in row["notes"])


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load of PyTorch 2.11
def test_export_writes_what_a_checkpoint_or_a_plan_makes(capsys, tmp_path):
    saved, out = str(tmp_path / "saved"), str(tmp_path / "out.pt2")
    model, x = fxsparse.demo.models.mlp(), torch.randn(2, 1, 8, 8)
    sparse = fxsparse.compile(model, fxsparse.Plan(sparsity=0.9), example_inputs=x)
    fxsparse.save(sparse, saved)
    assert run(capsys, "export", *SMALL, "--to", "program", "-o", out, "--checkpoint", saved)[0] == 0
    torch.testing.assert_close(torch.export.load(out).module()(x), sparse.eval()(x))
    assert run(capsys, "export", *SMALL, "--to", "program", "-o", out, "--sparsity", "0.9")[0] == 0
    code, _, err = run(capsys, "export", SMALL[0], "-o", out)
    assert (code, err.startswith("fxsparse: UsageError: export: expected example inputs")) == (2, True)


def test_output_goes_to_a_file(capsys, tmp_path):
    path = tmp_path / "kernels.json"
    _, out, _ = run(capsys, "kernels", "--format", "json", "-o", str(path))
    assert out == ""
    assert {"kernel", "op", "format"} <= json.loads(path.read_text())[0].keys()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trace", "absent_module:f"], "fxsparse: UsageError: model 'absent_module:f': "),
        (["plan", *SMALL], "fxsparse: UsageError: no plan: expected --sparsity 0.9, "),
        (["plan", *SMALL, "--sparsity", "0.9", "--exclude", "absent"], "fxsparse: PlanError: "),
        (["plan", *SMALL, "--plan", "absent.toml"], "fxsparse: PlanError: absent.toml: "),
        (["report", *SMALL, "--sparsity", "0.9", "--pattern", "3:7"], "fxsparse: PlanError: "),
        (
            ["trace", "fxsparse.demo.models:mlp", "--input", "4x64:qint8"],
            "fxsparse: UsageError: input '4x64:qint8': expected a dtype that is not quantized",
        ),
        (
            ["kernels", "-o", "/absent/folder/file"],
            "fxsparse: UsageError: -o '/absent/folder/file': expected a file",
        ),
        (
            ["bench", "absent_module:f", "-o", "/absent/folder/file"],
            "fxsparse: UsageError: -o '/absent/folder/file'",
        ),
        (
            ["export", *SMALL, "-o", "out.onnx", "--checkpoint", "file", "--sparsity", "0.9"],
            "fxsparse: UsageError: export: expected --checkpoint, which is sparse already, or the options of a plan, "
            "got both: --sparsity.",
        ),
        (["export", *SMALL, "-o", "out.onnx", "--method", "rigl"], "fxsparse: UsageError: no plan: "),
    ],
)
def test_errors_are_one_line_with_the_errors_name(capsys, words, line):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Modules of a user that fail when they are imported or called."""
    (tmp_path / "broken_at_import.py").write_text("1 / 0\n")
    (tmp_path / "broken_syntax.py").write_text("def build(:\n")
    (tmp_path / "broken_factory.py").write_text("def build(): raise KeyError('weights')\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["broken_at_import:build"],
            "importing 'broken_at_import' raises ZeroDivisionError: division by zero.",
        ),
        (["broken_syntax:build"], "importing 'broken_syntax' raises SyntaxError: "),
        (["broken_factory:build"], "the factory raises KeyError: 'weights'."),
    ],
)
def test_a_model_that_fails_is_one_line(capsys, failing, words, line):
    code, out, err = run(capsys, "trace", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"fxsparse: UsageError: model {words[0]!r}: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["99999999x999999", "9" * 30, "9" * 5000, "9999999999x9999999999"])
def test_an_input_that_no_tensor_can_be_is_one_line(capsys, text):
    code, out, err = run(capsys, "trace", "fxsparse.demo.models:mlp", "--input", text)
    assert (code, out) == (2, "")
    assert err.startswith(
        f"fxsparse: UsageError: input {text!r}: expected a size and dtype that a tensor can have"
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["absent"], ["plan"], ["plan", *SMALL, "--sparsity", "much"]])
def test_unknown_words_end_with_the_usage(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "usage: fxsparse" in capsys.readouterr().err
