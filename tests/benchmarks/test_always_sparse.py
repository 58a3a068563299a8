"""Nothing of a dense weight's size is made from construction to checkpoint, back and inference."""

from pathlib import Path

from benchmarks.always_sparse import run
from fxsparse import module


def test_no_tensor_has_the_size_of_a_dense_weight_whatever_is_done(tmp_path: Path, monkeypatch) -> None:
    width = 2048
    monkeypatch.setattr(module, "MAX_DENSE_BYTES", 4 * width * width)
    found = run(width, sparsity=0.999, tokens=32, folder=tmp_path)
    assert found["nonzeros"] == 3 * 4194
    assert (
        32 * width * 4 <= found["largest tensor, bytes"] < width * width / 8
    )  # bytes: no mask, not even of bits
    assert found["inference, s"] < found["compile for inference, s"]
    assert found["file bytes"] < 3 * 4194 * 30
