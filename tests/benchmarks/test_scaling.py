"""What benchmarks.scaling counts is linear in width for GSE, and its cells measure what they say."""

import pytest
import torch

from benchmarks.footprint import AllocatedBytes, measure
from benchmarks.scaling import COSTS, exponent, grid

CELL = {"method": "gse", "tokens": 64, "threads": 1}


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    assert exponent({2: 8.0, 4: 64.0, 8: 512.0}) == pytest.approx(3)


def test_bytes_are_counted_once_and_views_not_at_all() -> None:
    with AllocatedBytes() as counted:
        x = torch.zeros(10, 10)  # 400 bytes
        x.view(100).add_(1)
        torch.cat([x.t(), x])
    assert counted.total == 400 + 800
    assert counted.largest == 800


@pytest.mark.parametrize("model", ["mlp", "vit"])
def test_work_memory_and_updates_of_gse_are_linear_in_width_and_make_nothing_dense(model: str) -> None:
    widths = (1024, 2048) if model == "mlp" else (256, 512)
    found = {width: measure(CELL | {"model": model, "width": width}) for width in widths}
    for cost in COSTS:
        if "FLOP" in cost or "bytes" in cost:
            read = COSTS[cost][2]
            costs = {width: value for width, cell in found.items() if (value := read(cell)) is not None}
            assert 0.9 < exponent(costs) <= 1.03, cost
    if model == "mlp":
        largest = found[2048]["update_counts"]["largest_bytes"]
        assert largest < 2048 * 2048  # bytes: of a bool mask


def test_dense_weights_stop_where_they_would_not_fit() -> None:
    cells = list(grid(["mlp"], (8192, 16384), threads=1))
    assert [(cell["method"], cell["width"]) for cell in cells] == [
        ("gse", 8192),
        ("rigl", 8192),
        ("dense", 8192),
        ("gse", 16384),
    ]
