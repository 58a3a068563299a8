"""Tutorials, and pages with examples, run as they are written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxsparse import backend
from fxsparse.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PAGES = [
    ROOT / "docs" / name
    for name in (
        "methods.md",
        "spartan.md",
        "trainers.md",
        "torch_compile.md",
        "one_shot.md",
        "saving.md",
        "distributed.md",
    )
]


def run(path: Path) -> dict[str, Any]:
    """The names that the Python blocks of a page leave behind, run one after the other."""
    names: dict[str, Any] = {"__name__": path.stem}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(block, str(path), "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(path)
    written = {file.name for file in tmp_path.iterdir()}
    assert {"report.html", "Ramanujan gap by layer.svg"} <= written
    assert "transformed layers: 1.0000 of their FLOPs" in capsys.readouterr().out


def test_the_page_on_spartan_runs_and_its_masks_meet_the_plan():
    names = run(ROOT / "docs" / "spartan.md")
    kept = {
        name: sum(int(mask.sum()) for mask in names[name].masks().values()) for name in ("sparse", "blocks")
    }
    assert kept["sparse"] == int(6784 * 0.1)
    assert 6784 * 0.25 <= kept["blocks"] < 6784 * 0.25 + 64  # the fewest blocks that reach the budget
    weights = [p for p in names["dense"].parameters() if p.dim() > 1]
    assert sum(int((weight != 0).sum()) for weight in weights) == kept["blocks"]
    assert names["fast"](names["x"]).shape == (64, 10)


def test_the_page_on_torch_compile_runs(capsys, monkeypatch):
    aot = torch._dynamo.lookup_backend("aot_eager")  # in Inductor's place, which takes its time
    monkeypatch.setattr(backend.entry, "by_inductor", lambda gm, inputs, settings: aot(gm, list(inputs)))
    if (
        "fxsparse" not in torch._dynamo.list_backends()
    ):  # as its entry point says where the package is installed
        torch._dynamo.register_backend(backend.fxsparse, "fxsparse")
    names = run(ROOT / "docs" / "torch_compile.md")
    torch.testing.assert_close(names["y"], names["model"](names["x"]).detach())
    assert "dense, by Inductor" in capsys.readouterr().out
    assert names["share"] <= 0.1


def test_the_page_on_one_shot_pruning_runs_and_each_method_beats_the_one_above_it():
    names = run(ROOT / "docs" / "one_shot.md")
    errors = {
        name: sum(row["output_error"] for row in report.layers) for name, report in names["reports"].items()
    }
    assert errors["sparsegpt"] < errors["wanda"] < errors["static"]
    assert names["fast"](names["batches"][0]).shape == (32, 16)


def test_the_page_on_methods_runs_and_has_a_row_for_each_method_that_is_not_explained_elsewhere():
    names = run(ROOT / "docs" / "methods.md")
    entries = sum(mask.numel() for mask in names["snip"].masks().values())
    assert sum(int(mask.sum()) for mask in names["snip"].masks().values()) == int(entries * 0.1)
    rows = re.findall(r"^\| `(\w+)` \(", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    first = {"static", "set", "rigl", "srigl", "gse", "spartan", "dual_averaging", "gmp", "sr_ste"}
    assert sorted(rows) == rows
    assert set(rows) == {build().name for build in METHODS if build().one_shot is None} - first


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load of PyTorch 2.11
def test_the_page_on_saving_runs_and_every_file_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "docs" / "saving.md")
    x = names["x"]
    assert torch.equal(torch.export.load("fast.pt2").module()(x), names["fast"](x))
    torch.testing.assert_close(names["fast"](x), names["sparse"].eval()(x).detach())
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {
        "model.safetensors",
        "fxsparse.safetensors",
    }


@pytest.mark.parametrize("path", [*TUTORIALS, *PAGES], ids=lambda path: path.stem)
def test_a_tutorial_links_to_files_that_exist(path):
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []
