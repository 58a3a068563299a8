from dataclasses import replace

import pytest
import torch

from fxsparse import kernel as kernels
from fxsparse.kernel import Problem, candidates, capabilities, register, registered

CPU = torch.device("cpu")
ARGUMENTS = (("in_features", 48),)
PROBLEM = Problem("linear", (64, 48), 4, 300, torch.float32, CPU, False, None, ARGUMENTS)


@pytest.fixture
def registry(monkeypatch):
    registered()  # the shipped ones first
    monkeypatch.setattr(kernels, "_REGISTRY", dict(kernels._REGISTRY))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("cpu-csr", {"device": torch.device("cuda")}, "it runs on cpu, not cuda"),
        ("cpu-csr", {"dtype": torch.float16}, "it has float32 and bfloat16, not float16"),
        ("cpu-csr", {"training": True}, "it has no gradient: cpu-csr-train has"),
        ("cpu-csr-train", {}, "it is for training: cpu-csr needs less memory"),
        ("cpu-condensed", {}, "rows have different numbers of nonzeros"),
        ("cpu-condensed", {"training": True}, "it has no gradient"),
        ("dense", {"training": True}, "training needs the mask: dense-masked has it"),
        ("dense-masked", {}, "inference folds the mask: dense needs no multiplication"),
        ("dense", {"op": "conv2d"}, "it computes linear, not conv2d"),
    ],
)
def test_every_refusal_says_why(name, change, reason):
    usable, refusals = candidates(replace(PROBLEM, **change))
    assert reason in refusals[name]
    assert name not in [kernel.name for kernel in usable]


def test_a_third_party_kernel_is_a_candidate_and_names_are_unique(registry):
    dense = registered()["dense"]
    theirs = register(replace(dense, name="theirs"))
    assert theirs in candidates(PROBLEM)[0]
    with pytest.raises(ValueError, match="'theirs' is registered already"):
        register(theirs)


def test_capabilities_have_one_row_per_kernel():
    rows = {row["kernel"]: row for row in capabilities()}
    assert rows.keys() == registered().keys()
    assert rows["dense"]["available"] == "yes"
    assert rows["dense"]["dtypes"] == ["float32", "bfloat16", "float16", "float64"]
    assert all(row["dtypes"] or row["available"] != "yes" for row in rows.values())


def test_costs_count_stored_entries():
    assert registered()["cpu-csr"].cost(PROBLEM).flops == 2 * 4 * 300
    assert registered()["cpu-csr-train"].cost(replace(PROBLEM, training=True)).flops == 6 * 4 * 300
    assert registered()["dense"].cost(PROBLEM).flops == 2 * 4 * 64 * 48
    assert registered()["cpu-condensed"].cost(PROBLEM).bytes == 300 * (4 + 2)
