import sys

import pytest
import torch

from fxsparse.demo.outcome import Latency, Outcome, tables
from fxsparse.demo.page import draw, write_page
from fxsparse.errors import UnsupportedError
from fxsparse.report import Report


def layer(name, storage, nnz, reason):
    return {"name": name, "storage": storage, "nnz": nnz, "numel": 64, "reason": reason}


@pytest.fixture
def outcome():
    trained = Report(totals={"sparsity": 0.9})
    sparse, slow = (
        layer("1.weight", "compact", 8, "csr 3x"),
        layer("5.weight", "dense", 60, "dense 2 us & best"),
    )
    fast = Report(layers=[sparse, slow, layer("7.weight", "dense", 64, "it has no zeros")])
    return Outcome(
        "MLP",
        accuracy={"dense": 98.0, "masked": 97.0, "compact": 96.5},
        seconds={"dense": 2.0, "masked": 2.5, "compact": 1.0},
        reports={"masked": trained, "compact": trained},
        latencies=[Latency(1, 200.0, 50.0, fast), Latency(64, 100.0, 125.0, fast)],
        masks={"1.weight": torch.eye(8).bool()},
    )


def test_training_table_says_accuracy_and_zeros_of_every_run(outcome):
    (_, headers, rows), *_ = tables([outcome])
    assert headers[2:] == ["zeros", "test accuracy (%)", "training (s)"]
    assert rows == [
        ["MLP", "dense", "0.0%", "98.0", "2.0"],
        ["MLP", "masked", "90.0%", "97.0", "2.5"],
        ["MLP", "compact", "90.0%", "96.5", "1.0"],
    ]


def test_latency_table_has_the_ratio(outcome):
    _, (_, _, rows), _ = tables([outcome])
    assert rows == [["MLP", "1", "200", "50", "4.00x"], ["MLP", "64", "100", "125", "0.80x"]]


def test_lost_table_lists_slower_models_and_layers_kept_dense(outcome):
    *_, (_, _, rows) = tables([outcome])
    assert rows == [
        ["MLP", "1", "5.weight", "dense 2 us & best"],
        ["MLP", "64", "the whole model", "0.80x of dense"],
        ["MLP", "64", "5.weight", "dense 2 us & best"],
    ]


def test_page_is_self_contained_and_escaped(outcome, tmp_path):
    write_page([outcome], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/png;base64,") == len(draw([outcome])) == 4
    assert "dense 2 us &amp; best" in text
    assert "MLP, inference at batch 64: Layers" in text
    assert "http" not in text


def test_without_matplotlib_it_says_what_to_install(outcome, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'fxsparse\[demo\]'"):
        write_page([outcome], tmp_path / "report.html")
