import torch

from benchmarks import block_linear


def test_each_batch_has_times_of_every_kernel():
    weight = torch.zeros(64, 32)
    weight[:16, 16:] = 1.0
    batch, dense, bsr, limit = block_linear.row(weight, torch.randn(4, 32), ("cpu-bsr",), 3)
    assert batch == "4"
    assert float(dense) >= 0
    assert float(limit) >= 0
    assert bsr.endswith("x)")
    assert len(block_linear.headers(("cpu-bsr",))) == 4
