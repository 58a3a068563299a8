import sys

from benchmarks import spectral


def test_all_weights_of_a_model_are_measured(monkeypatch, capsys):
    arguments = ["spectral", "--model", "squeezenet1_1", "--sparsity", "0.8"]
    monkeypatch.setattr(sys, "argv", arguments)
    spectral.main()
    printed = capsys.readouterr().out
    assert "classifier.1.weight" in printed
    row = [part.strip() for part in printed.splitlines()[-1].split("|")[1:-1]]
    assert row[:3] == ["squeezenet1_1", "80%", "26"]
    assert int(row[3]) > 15
