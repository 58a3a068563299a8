import pytest
import torch

from benchmarks import layer_methods
from benchmarks import srigl_layer as bench
from benchmarks.cells import Cell
from fxsparse.kernels import cpu


def cell(batch=1, rows=318, **times):
    settings = {"sparsity": 90, "rows": rows, "fan_in": 741, "dtype": "float32", "threads": 1, "batch": batch}
    spread = {name.replace("_", " "): [us - 1, us - 0.5, us, us + 1] for name, us in times.items()}
    plain = {f"{name}, no scatter": us for name, us in spread.items() if name in bench.OURS}
    return Cell(settings, {"us": spread | plain, "alone": spread | plain}, 1.0, {})


TIMES = {"dense": 240.0, "dense_compiled": 200.0, "structured": 90.0, "structured_compiled": 95.0}


def test_the_grid_has_every_layer_batch_thread_and_dtype_once_and_the_headline_first():
    cells = bench.grid(quick=False, deepsparse=True)
    assert len(cells) == 5 * 12 * 2 * 2
    assert len({str(c) for c in cells}) == len(cells)
    assert [(c["rows"], c["fan_in"], c["batch"], c["calls"]) for c in cells[:2]] == [
        (318, 741, 1, 10_000),
        (768, 307, 1, 10_000),
    ]


def test_the_layers_hold_the_published_numbers_of_nonzeros():
    budgets = {80: 471_859, 90: 235_929, 95: 117_964, 99: 23_592}
    for sparsity, rows, fan_in in bench.LAYERS:
        assert fan_in == budgets[sparsity] // rows


def test_a_layer_has_its_rows_and_fan_in():
    weight, bias = layer_methods.layer(5, 7, torch.bfloat16, 12, 33)
    assert sorted((weight != 0).sum(1).tolist()) == [0] * 7 + [7] * 5
    assert (weight.dtype, bias.shape) == (torch.bfloat16, (12,))


def test_ours_is_the_faster_kernel_and_ratios_are_against_the_best_of_each_kind():
    times = bench.medians(cell(**TIMES, CSR=150.0, structured_CSR=140.0, lookup=20.0, condensed=50.0))
    assert times["ours"] == times["ours, no scatter"] == 20
    assert bench.ratios(times) == {"dense": 10, "structured": 4.5, "CSR": 7}
    name, alone = bench.alone_row(cell(**TIMES, lookup=20.0, condensed=50.0))
    assert name == "318 x 741, float32, 1 thread(s)"
    assert alone == {"ours": 20, "dense": 10, "structured": 4.5}


def test_a_row_says_what_is_an_estimate_and_keeps_losses():
    line = bench.row(cell(rows=280, **TIMES, lookup=400.0, condensed=500.0))
    assert line["rows x fan-in"] == "~280 x 741"
    assert (line["dense compiled"], line["ours"], line["of dense"]) == ("200.0", "400.0", "0.50x")


def test_crossovers_name_every_batch_that_is_lost():
    lines = bench.crossovers(
        [
            cell(1, **TIMES, lookup=20.0, condensed=50.0),
            cell(2, **TIMES, lookup=95.0, condensed=99.0),
            cell(4, **TIMES, lookup=999.0, condensed=999.0),
        ]
    )
    assert lines[0].endswith("ours is slower than dense at batch 4 (batches 1 to 4)")
    assert lines[1].endswith("ours is slower than structured at batch 2, 4 (batches 1 to 4)")


def test_the_check_refuses_a_wrong_product_and_knows_who_returns_active_rows():
    weight, bias = layer_methods.layer(5, 7, torch.float32, 12, 33)
    x = torch.randn(2, 33)
    y = x @ weight.t() + bias
    layer_methods.check("dense", y, x, weight, bias)
    layer_methods.check("structured", y[:, weight.any(1)], x, weight, bias)
    with pytest.raises(ValueError, match="dense: expected a relative error"):
        layer_methods.check("dense", y * 1.01, x, weight, bias)


@pytest.mark.skipif(not cpu.has("avx512vbmi"), reason="the benchmark times the lookup kernel")
def test_every_method_of_this_process_computes_the_layer(monkeypatch):
    monkeypatch.setattr(layer_methods, "compiled", lambda function: function)  # Inductor takes seconds
    weight, bias = layer_methods.layer(5, 7, torch.float32, 12, 33)
    x = torch.randn(2, 33)
    calls = layer_methods.calls(x, weight, bias)
    assert len(calls) == 11
    with torch.no_grad():
        for name, call in calls.items():
            layer_methods.check(name, call(), x, weight, bias)
        result = bench._times(calls, None, 40)
    assert result["us"].keys() == result["alone"].keys() == calls.keys()


def test_the_figure_has_a_panel_for_each_layer(tmp_path):
    pytest.importorskip("matplotlib")
    cells = [
        cell(batch, rows, **TIMES, lookup=20.0, condensed=50.0) for rows in (318, 768) for batch in (1, 2)
    ]
    bench.draw(cells, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
