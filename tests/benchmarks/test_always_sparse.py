"""Nothing of a dense weight's size is made from construction to checkpoint and back."""

from pathlib import Path

from benchmarks.always_sparse import run


def test_no_tensor_has_the_size_of_a_dense_weight_in_training_update_save_or_load(tmp_path: Path) -> None:
    width = 2048
    found = run(width, sparsity=0.999, tokens=32, folder=tmp_path)
    assert found["nonzeros"] == 3 * 4194
    assert (
        32 * width * 4 <= found["largest tensor, bytes"] < width * width / 8
    )  # bytes: no mask, not even of bits
    assert found["file bytes"] < 3 * 4194 * 30
