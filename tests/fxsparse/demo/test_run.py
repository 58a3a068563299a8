import torch
from torch import nn

from fxsparse.demo import run as demo


def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


def test_the_job_runs_from_training_to_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(demo, "ROUNDS", {1: 5, 64: 5})
    threads = torch.get_num_threads()
    (outcome,) = demo.run(tmp_path / "report.html", steps=80, threads=2)
    assert torch.get_num_threads() == threads
    assert list(outcome.accuracy) == list(outcome.seconds) == ["dense", "masked", "compact"]
    assert min(outcome.accuracy.values()) > 50  # a tenth is right by chance
    assert [timed.batch for timed in outcome.latencies] == [1, 64]
    assert {row["storage"] for row in outcome.reports["compact"].layers} == {"compact"}
    printed = capsys.readouterr().out
    assert "tiny, trained compact" in printed
    assert "insert-mask-updates" in printed
    assert "Inference: median of runs taken in turns" in printed
    page = (tmp_path / "report.html").read_text()
    assert "tiny, inference at batch 64" in page
    assert "tiny: ITOP rate" in page


def test_compact_training_moves_the_masks_exactly_as_masked_training_does(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MODELS", {"tiny": tiny})
    digits, outcome = demo.load_digits(), demo.Outcome("tiny")
    masked, compact = (
        demo._train_sparse(outcome, s, tiny, digits, 40, 0).masks() for s in ("masked", "compact")
    )
    assert all(torch.equal(masked[name], compact[name]) for name in masked)
