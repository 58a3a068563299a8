import pytest
from torch import nn

from benchmarks import sparse_ift_coverage as coverage
from benchmarks.cells import Cell


def test_every_family_has_models_and_the_quick_ones_are_among_them():
    families = coverage.families()
    assert len(families["ResNet"]) == 10
    assert len(families["RegNet"]) == 15
    assert all(families.values())
    assert set(coverage.QUICK) <= {name for names in families.values() for name in names}


def test_a_cell_tells_flops_names_and_whether_it_ran():
    cell = coverage.measure({"model": "hf:llama-small", "transform": "sparse-wide", "sparsity": 0.75})
    assert cell["outcome"] == "done"
    assert cell["run"].endswith(" s")
    assert cell["within_1_percent"]
    assert cell["sensible_names"]
    assert cell["layers_ratio"] == 1
    assert cell["model_ratio"] > 1
    assert cell["transformed_M"] > cell["parameters_M"]


def test_a_refusal_is_a_row_with_its_reason():
    program, _, _ = coverage.captured("hf:llama-small")
    assert program.graphs["train"] is program.graphs["eval"]
    settings = {"model": "hf:llama-small", "transform": "sparse-parallel", "sparsity": 0.6}
    result = coverage.measure(settings)
    assert result["outcome"] == "refused"
    assert result["reason"].startswith("PlanError: SparseParallel: expected a sparsity 1 - 1/k")
    assert coverage.refusals([Cell(settings, result, 0.0, {})]).endswith(
        ": hf:llama-small sparse-parallel 0.6"
    )


@pytest.mark.parametrize(
    ("name", "sensible"),
    [
        ("a.conv.weight", True),
        ("a.conv.branches.3.weight", True),
        ("a.in_proj.u.weight", True),
        ("u.weight", False),
    ],
)
def test_sensible_names_are_old_ones_or_lie_below_a_layer(name, sensible):
    assert coverage.is_sensible(name, {"a.conv.weight": 1, "a.in_proj_weight": 1}) is sensible


def test_a_parameter_without_a_gradient_is_named():
    model = nn.Linear(2, 2)
    model.unused = nn.Parameter(model.bias.detach().clone())
    assert coverage.forward_and_backward(model, model.weight.detach()) == "no gradient: unused"
