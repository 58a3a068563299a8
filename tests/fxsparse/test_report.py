import json
import sys

import pytest
import torch

from fxsparse.errors import InvariantError
from fxsparse.report import Report, cell, check_complete
from fxsparse.topology import TopologyHistory

LAYER = {
    "name": "fc.weight",
    "op": "linear",
    "shape": (10, 20),
    "pattern": "Unstructured()",
    "storage": "masked",
    "kernel": "dense",
    "reason": "<no compact kernel>",
    "sparsity_target": 0.9,
    "sparsity": 0.9,
    "nnz": 20,
    "numel": 200,
    "flops_dense": 400_000,
    "flops_sparse": 40_000,
}


def sample() -> Report:
    return Report(
        passes=[{"name": "clean-up", "rewrites": 0, "seconds": 0.25, "notes": ["nothing", "to do"]}],
        layers=[LAYER],
        untouched=[{"name": "fc.bias", "reason": "bias"}],
        totals={"numel": 200, "nnz": 20},
        environment={"torch": "2"},
        notes=["symbolic: data-dependent branch"],
    )


def test_to_dict_has_every_contract_key_and_none_for_unknown():
    d = sample().to_dict()
    assert set(d["passes"][0]) == {"name", "rewrites", "seconds", "notes"}
    assert set(LAYER) <= set(d["layers"][0])
    assert d["layers"][0]["flops_executed"] is None
    assert d["totals"]["train_flops_ratio"] is None
    assert set(d["environment"]) == {"torch", "device", "threads", "dtype", "kernels"}


def test_json_round_trips_to_dict():
    report = sample()
    report.layers[0] = LAYER | {"sparse_us": float("nan")}
    assert json.loads(report.to_json()) == report.to_dict()


def test_unknown_is_a_dash_and_never_zero():
    text = str(sample())
    executed = next(line for line in text.splitlines() if line.startswith("fc.weight"))
    assert "—" in executed
    assert cell(None) == cell(float("nan")) == "—"
    assert cell(0) == "0"


def test_headers_carry_units_and_three_separate_flop_columns():
    text = str(sample())
    for header in ("dense (FLOP)", "theoretical (FLOP)", "executed (FLOP)", "time (s)"):
        assert header in text
    assert "dense (us)" not in text


def test_measured_columns_appear_once_something_was_measured():
    report = Report(layers=[LAYER | {"dense_us": 12.5, "sparse_us": 3.0}])
    assert "dense (us)" in str(report)
    assert "12.5" in str(report)


def test_front_end_notes_come_first():
    assert str(sample()).index("data-dependent") < str(sample()).index("clean-up")


def test_a_model_with_nothing_eligible_prints():
    report = Report(untouched=[{"name": "bn.weight", "reason": "normalisation"}])
    assert "bn.weight" in str(report)
    assert "Layers" not in str(report)
    assert report.to_dict()["layers"] == []
    assert str(Report()) == ""


def test_markdown_has_a_heading_and_a_table_per_part():
    text = sample().to_markdown()
    assert "## Layers" in text
    assert "|--" in text


def test_a_reason_of_several_lines_or_with_pipes_stays_one_cell():
    report = Report(untouched=[{"name": "w", "reason": "a | b\n  c"}])
    assert "a | b c" in str(report)
    assert "a \\| b c" in report.to_markdown()


def test_html_escapes_text_and_embeds_plots():
    html = sample().to_html({"a < b": b"\x89PNG"})
    assert "&lt;no compact kernel&gt;" in html
    assert "<no compact kernel>" not in html
    assert 'src="data:image/png;base64,iVBORw=="' in html
    assert "a &lt; b" in html
    assert "http" not in html
    assert sample()._repr_html_().startswith("<!doctype html>")


def test_check_complete_accepts_each_parameter_once():
    check_complete(sample(), ["fc.weight", "fc.bias"])


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["fc.weight", "fc.bias", "lost"], "missing ['lost']"),
        (["fc.weight"], "not a parameter ['fc.bias']"),
    ],
)
def test_check_complete_names_what_is_wrong(names, part):
    with pytest.raises(InvariantError) as caught:
        check_complete(sample(), names)
    assert part in str(caught.value)


def test_check_complete_refuses_a_parameter_listed_twice():
    report = sample()
    report.untouched.append({"name": "fc.weight", "reason": "tied"})
    with pytest.raises(InvariantError, match=r"twice \['fc.weight'\]"):
        check_complete(report, ["fc.weight", "fc.bias"])


def moved() -> Report:
    report = sample()
    report.topology = TopologyHistory({"fc.weight": (2, 4)})
    report.topology.record_masks("fc.weight", 5, torch.eye(2, 4).bool(), torch.eye(2, 4).bool().flip(1))
    return report


def test_topology_rows_and_the_last_one_of_each_weight_as_a_table():
    report = moved()
    rows = report.to_dict()["topology"]
    assert [(row["step"], row["grown"], row["churn"]) for row in rows] == [(0, 0, None), (5, 2, 1.0)]
    assert json.loads(report.to_json())["topology"] == rows
    title, headers, cells = next(table for table in report.tables() if "update" in table[0])
    assert headers == [
        *("name", "step", "nnz", "active neurons", "neurons"),
        *("least fan-in", "mean fan-in", "largest fan-in", "churn"),
    ]
    assert cells == [["fc.weight", "5", "2", "2", "2", "1", "1", "1", "1"]]
    assert title in str(report)
    report.topology.track_itop(5)
    assert "ITOP rate" in str(report)
    assert "Masks" not in str(sample())


def test_html_plots_how_masks_moved():
    html = moved().to_html({"another": b"\x89PNG"})
    assert html.count('src="data:image/svg+xml;base64,') == 3
    assert 'alt="Churn"' in html
    assert 'src="data:image/png;base64,' in html
    assert "data:image/svg" not in sample().to_html()


def test_html_without_matplotlib_has_the_table_and_says_how_to_get_plots(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    html = moved().to_html()
    assert "<img" not in html
    assert "Masks after the last update" in html
    assert "plots need matplotlib" in html
    assert "fxsparse[viz]" in html
