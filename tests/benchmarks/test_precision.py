import pytest
import torch

from benchmarks import precision
from fxsparse.kernels import cpu


@pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))
def test_a_layer_has_a_row_for_each_batch_with_gains_and_errors():
    rows = precision.of_layer((64, 48), 0.8, 2, batches=(1, 5))
    assert [row["batch"] for row in rows] == ["1", "5"]
    for row in rows:
        assert row["float32 (us)"].split()[1] in ("csr", "lookup", "striped")
        assert row["int8, faster"].endswith("x")
        assert 0 < float(row["bfloat16, error"]) < 1e-2
        assert 0 < float(row["int8, error"]) < 3e-2


def test_a_model_has_one_row_with_its_error(monkeypatch):
    class Published:
        def pruned(self, sparsity):
            torch.manual_seed(0)
            linear = torch.nn.Linear(64, 48)
            with torch.no_grad():
                linear.weight *= torch.rand_like(linear.weight) > sparsity
            return linear.eval()

        def inputs(self, batch):
            return torch.randn(batch, 64)

    monkeypatch.setattr(precision, "WHOLE", {"tiny": Published()})
    with torch.no_grad():
        row = precision.of_model("tiny", 2)
    assert row["model"] == "tiny"
    assert row["int8, weights"] in ("0 of 1", "1 of 1")
    assert float(row["int8, error"]) < 3e-2
