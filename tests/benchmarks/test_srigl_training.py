import torch

from benchmarks.cells import Cell
from benchmarks.srigl_training import (
    RIGL,
    SRIGL,
    WITHOUT_ABLATION,
    draw,
    infer_cell,
    inference_table,
    neuron_table,
    neurons,
    train_cell,
    training_table,
)
from benchmarks.tasks.comparison import settings_of
from benchmarks.tasks.digits import TASK


def settings(method, seed=0, steps=30):
    return settings_of(TASK, "MLP", method, 0.99, steps, seed)


def cell(method, seed, score, active=3):
    return Cell(
        settings(method, seed), {"score": score, "neurons": {"w": (active, 4, 2)}}, 1.0, {"threads": 1}
    )


def test_neurons_without_an_active_entry_are_not_counted():
    mask = torch.tensor([[[True, False], [True, True]], [[False, False], [False, False]]])
    assert neurons(mask) == (1, 2, 3)


def test_the_table_says_whether_rigl_is_reached():
    rows = {RIGL: (90, 91, 92), SRIGL: (90, 92, 92), WITHOUT_ABLATION: (80, 82, 84)}
    cells = [cell(method, seed, score) for method, row in rows.items() for seed, score in enumerate(row)]
    lines = training_table(cells).splitlines()[2:]
    assert [line.split("|")[7].strip() for line in lines] == ["", "yes", "**no, below**"]
    assert "+0.33 ± 0.33" in lines[1]
    assert all("3 of 4" in line for line in lines)
    assert neuron_table(cells).count("3 of 4") == 2  # the first seed of both kinds of SRigL


def test_ablation_leaves_fewer_neurons_with_a_larger_fan_in():
    def measured(method, steps):
        return train_cell(settings(method, steps=steps))["neurons"]["3.weight"]

    active, total, fan_in = measured(SRIGL, 55)  # the shortest training with an update
    assert active < total == 1024
    assert measured(WITHOUT_ABLATION, 1) == (1024, 1024, 5)
    assert fan_in > 5


def test_the_compiled_model_is_measured_at_both_batches():
    result = infer_cell(settings(SRIGL))
    assert result["dense_bytes"] > 4 * (64 + 1024 + 10) * 1024
    for batch in ("batch_1", "batch_64"):
        assert result[batch]["bytes"] < result["dense_bytes"] / 5
        assert result[batch]["ratio"] > 0
    table = inference_table([Cell(settings(SRIGL), result, 1.0, {"threads": 1})])
    assert f"{result['batch_1']['ratio']:.2f}x" in table


def test_the_figure_is_drawn(tmp_path):
    methods = (RIGL, SRIGL, WITHOUT_ABLATION)
    cells = [cell(method, seed, 90 + seed) for method in methods for seed in range(2)]
    for c in cells:
        c.result["neurons"]["v"] = (1, 2, 3)
    draw(cells, tmp_path / "srigl.png")
    assert (tmp_path / "srigl.png").read_bytes().startswith(b"\x89PNG")
