"""The record over training: what the loop asked for, at its steps, as rows, text and plots."""

import sys
import xml.etree.ElementTree as ET

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.analysis import SpectralHistory, spectral_layers
from fxsparse.analysis.plots import draw_layers
from fxsparse.errors import UnsupportedError
from fxsparse.methods import rigl


@pytest.fixture(scope="module")
def trained():
    """Records at steps 0, 4, 8 and 12 of a run whose masks move at steps 4 and 8, and the module."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    plan = Plan(sparsity=0.8, method=rigl(every=4, stop=12, drop_fraction=0.5), storage="masked")
    sparse = fxsparse.compile(model, plan, example_inputs=(torch.randn(2, 48),))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    history = SpectralHistory()
    history.record(sparse)
    for step in range(1, 13):
        optimizer.zero_grad()
        F.cross_entropy(sparse(torch.randn(16, 48)), torch.randint(10, (16,))).backward()
        optimizer.step()
        if step % 4 == 0:
            history.record(sparse)
    return history, sparse


def test_records_are_of_the_masks_at_their_steps(trained):
    history, sparse = trained
    assert list(history.records) == [0, 4, 8, 12]
    assert history.records[12] == spectral_layers(sparse)
    assert history.records[0]["0.weight"].ramanujan_gap != history.records[4]["0.weight"].ramanujan_gap
    assert {one.nnz for at in history.records.values() for one in [at["0.weight"]]} == {
        history.records[0]["0.weight"].nnz
    }


def test_rows_are_plain_and_in_order(trained):
    history, _ = trained
    rows = history.rows()
    assert [(row["step"], row["name"]) for row in rows[:4]] == [
        (0, "0.weight"),
        (0, "2.weight"),
        (0, "4.weight"),
        (4, "0.weight"),
    ]
    assert rows[0]["ramanujan_gap"] == history.records[0]["0.weight"].ramanujan_gap
    assert all(
        value is None or isinstance(value, str | int | float) for row in rows for value in row.values()
    )


def test_a_second_record_of_a_step_replaces_the_first(trained):
    _, sparse = trained
    history = SpectralHistory()
    history.record(sparse, ["0.weight"])
    history.record(sparse, ["2.weight"])
    assert [list(at) for at in history.records.values()] == [["2.weight"]]


def test_the_text_has_the_last_table_and_the_means(trained):
    history, _ = trained
    text = str(history)
    assert text.startswith("At step 12\n")
    last = history.records[12].values()
    mean = sum(one.ramanujan_gap for one in last if one.ramanujan_gap is not None)
    mean /= sum(one.ramanujan_gap is not None for one in last)
    assert history.means()[12]["ramanujan_gap"] == pytest.approx(mean)
    assert [line.split()[0] for line in text.splitlines()[-4:]] == ["0", "4", "8", "12"]
    assert f"{mean:.4g}" in text.splitlines()[-1]
    assert str(SpectralHistory()) == "no records"


def test_plots_name_weights_and_steps(trained):
    history, _ = trained
    plots = history.draw()
    assert list(plots) == ["Ramanujan gap by layer", "Spectral gaps over training"]
    for image in plots.values():
        ET.fromstring(image.decode())
    by_layer = plots["Ramanujan gap by layer"].decode()
    assert all(f"<!-- {text} -->" in by_layer for text in ("0.weight", "step 0", "step 12"))
    assert "<!-- full-spectrum distance -->" in plots["Spectral gaps over training"].decode()
    assert history.draw() == plots


def test_the_report_takes_the_plots(trained):
    history, sparse = trained
    assert "Ramanujan gap by layer" in sparse.report.to_html(plots=history.draw())


def test_one_record_is_drawn_by_layer_alone(trained):
    _, sparse = trained
    history = SpectralHistory()
    assert history.draw() == {}
    history.record(sparse)
    assert list(history.draw()) == ["Ramanujan gap by layer"]


def test_a_missing_matplotlib_is_named(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'fxsparse\[viz\]'"):
        trained[0].draw()


def test_a_layer_is_drawn_from_its_first_gap_to_its_last(trained):
    rows = [row for row in trained[0].rows() if row["name"] == "0.weight"]
    drawn = draw_layers(rows)
    changed = [[row | {"ramanujan_gap": 9.0} if row is rows[i] else row for row in rows] for i in (0, 1, -1)]
    assert [draw_layers(row) == drawn for row in changed] == [False, True, False]
