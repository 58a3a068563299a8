"""The coverage table: what a row says of a model, and what the summary counts."""

import torch
from torch import nn

from benchmarks.cells import Cell
from benchmarks.coverage.__main__ import page, summary, table
from benchmarks.coverage.hugging_face import hugging_face_models
from benchmarks.coverage.measure import measure
from benchmarks.coverage.models import timm_models, torchvision_models


class WithBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.last(hidden.relu() if hidden.sum() > 0 else hidden) @ self.scale


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")


def test_a_row_and_the_summary() -> None:
    torch.manual_seed(0)
    row = measure(WithBranch(), torch.randn(2, 8))
    assert (row["front_end"], row["weights"], row["train"], row["infer"]) == ("walk", 2, "equal", "equal")
    assert row["covered_percent"] == round(100 * 192 / 208, 2)
    assert list(row["left"].values()) == [1]
    assert row["lost"] == row["lost_infer"] == []
    refused = measure(Failing(), torch.randn(2, 8))
    assert refused["train"].startswith("TraceError: the model itself fails")
    cells = [
        Cell({"part": "own", "model": name}, result, 0.0, {}) for name, result in (("a", row), ("b", refused))
    ]
    counts = [word.strip() for word in summary(cells).splitlines()[-1].split("|")[1:-1]]
    assert counts[:-2] + counts[-1:] == ["own", "2", "0", "0", "1", "1", "1", "1", "0"]
    assert float(counts[-2]) == float(f"{row['error']:.1e}")
    assert "own:a" in table(cells)
    text = page(cells)
    assert text.startswith("# Coverage\n\nWhat compiles")
    assert all(part in text for part in (summary(cells), table(cells)))


def test_the_models_that_are_asked_for() -> None:
    kinds = torchvision_models(), timm_models(), hugging_face_models()
    assert [len(models) >= least for models, least in zip(kinds, (80 + 6 + 7, 200, 40), strict=True)] == [
        True
    ] * 3
    assert len(set(timm_models())) == 200
