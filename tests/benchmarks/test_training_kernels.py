import torch

from benchmarks.training_kernels import layer_rows


def test_a_layer_has_a_row_for_each_product_and_for_a_move():
    threads = torch.get_num_threads()
    try:
        rows = layer_rows(32, 48, 16, 0.9, 2)
    finally:
        torch.set_num_threads(threads)
    assert [row[4] for row in rows] == ["forward", "input gradient", "weight gradient", "move"]
    assert all(row[5] > 0 for row in rows)
