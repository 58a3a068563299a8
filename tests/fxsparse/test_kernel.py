from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fxsparse import kernel as kernels
from fxsparse.errors import UnsupportedError
from fxsparse.kernel import Entries, Problem, candidates, capabilities, choose, register, registered
from fxsparse.testing import sparse_weight

CPU = torch.device("cpu")
ARGUMENTS = (("in_features", 48),)
PROBLEM = Problem("linear", (64, 48), 4, 300, torch.float32, CPU, False, None, ARGUMENTS)


@pytest.fixture
def registry(monkeypatch):
    registered()  # the shipped ones first
    monkeypatch.setattr(kernels, "_REGISTRY", dict(kernels._REGISTRY))
    monkeypatch.setattr(kernels, "_CHOICES", {})


def call(dtype=torch.float32):
    weight = sparse_weight((64, 48), 0.1).to(dtype)
    return torch.randn(4, 48, dtype=dtype), weight, torch.randn(64, dtype=dtype)


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


def test_choice_names_the_times_of_all_candidates_and_is_remembered(registry):
    x, weight, bias = call()
    choice = choose(PROBLEM, x, weight, bias, "relu", rounds=3)
    usable, _ = candidates(PROBLEM)
    assert choice.times_us.keys() == {kernel.name for kernel in usable}
    assert all(time > 0 for time in choice.times_us.values())
    assert choice.kernel.name in choice.reason
    assert choose(PROBLEM, x, weight, bias, "relu", rounds=3) is choice
    assert choose(PROBLEM, x, weight, bias, rounds=3) is not choice


def test_another_process_recalls_the_times_and_derives_the_choice_anew(registry, monkeypatch):
    x, weight, bias = call()
    first = choose(PROBLEM, x, weight, bias, rounds=3)
    monkeypatch.setattr(kernels, "_CHOICES", {})
    monkeypatch.setattr(kernels, "_measured", None)
    second = choose(PROBLEM, x, weight, bias)
    assert (second.times_us, second.kernel, second.reason) == (first.times_us, first.kernel, first.reason)
    assert (first.recalled, second.recalled) == (False, True)
    assert choose(PROBLEM, x, weight, bias, advantage=1e-6).kernel.name == "dense"


def test_other_kernels_other_threads_or_other_code_are_measured_again(registry, monkeypatch):
    x, weight, bias = call()
    choose(PROBLEM, x, weight, bias, rounds=3)
    with monkeypatch.context() as edited:
        edited.setattr(kernels, "_digest", lambda file: "edited")
        assert not choose(PROBLEM, x, weight, bias, rounds=3).recalled
    register(replace(registered()["dense"], name="new"))
    assert not choose(PROBLEM, x, weight, bias, rounds=3).recalled


def test_the_limit_of_a_kernel_follows_from_its_cost(monkeypatch):
    monkeypatch.setattr(kernels.machine, "limit_us", lambda *cost: cost)
    assert kernels.limit_us(registered()["dense"], PROBLEM) == (2 * 4 * 64 * 48, 64 * 48 * 4, torch.float32)


def test_training_problems_time_the_backward_too(registry):
    x, weight, bias = call()
    choice = choose(replace(PROBLEM, training=True), x, weight, bias, rounds=3)
    assert choice.kernel.name in ("dense-masked", "cpu-csr-train")
    assert "dense-masked" in choice.times_us


def test_a_sparse_kernel_has_to_be_clearly_faster(registry):
    x, weight, bias = call()
    register(replace(registered()["dense"], name="as-fast", format="csr"))
    choice = choose(PROBLEM, x, weight, bias, advantage=1e-6, rounds=3)
    assert choice.kernel.name == "dense"


def test_a_wrong_kernel_is_never_chosen(registry):
    def wrong(x, bias, weight, activation="none", in_features=None):
        return F.linear(x, weight * 1.01, bias)

    register(replace(registered()["dense"], name="wrong", format="csr", run=wrong))
    choice = choose(PROBLEM, *call(), rounds=3, advantage=1e9)
    assert choice.kernel.name != "wrong"
    assert "its result is wrong here: relative error" in choice.refusals["wrong"][0]


def entries_of(weight):
    mask = weight != 0
    return Entries(weight[mask], mask.nonzero().t().int(), tuple(weight.shape))


def test_given_entries_no_dense_kernel_takes_part_and_a_wrong_one_is_found(registry):
    def wrong(x, bias, values, *rest, **arguments):
        return registered()["cpu-csr"].run(x, bias, values * 1.01, *rest, **arguments)

    register(replace(registered()["cpu-csr"], name="wrong", run=wrong))
    x, weight, bias = call()
    choice = choose(PROBLEM, x, entries_of(weight), bias, "relu", rounds=3, advantage=1e9)
    packing = {kernel.name for kernel in candidates(PROBLEM)[0] if kernel.pack_entries is not None}
    assert set(choice.times_us) == packing - {"wrong"}
    assert "cpu-csr" in choice.times_us
    assert not any(registered()[name].format == "dense" for name in choice.times_us)
    assert choice.refusals["dense"] == ["it packs dense weights only"]
    assert "its result is wrong here: relative error" in choice.refusals["wrong"][0]
    assert "dense" in choose(PROBLEM, x, weight, bias, "relu", rounds=3).times_us, "remembered apart"


def test_a_third_party_kernel_is_a_candidate_and_names_are_unique(registry):
    dense = registered()["dense"]
    theirs = register(replace(dense, name="theirs"))
    assert theirs in candidates(PROBLEM)[0]
    with pytest.raises(ValueError, match="'theirs' is registered already"):
        register(theirs)


def test_nothing_to_run_lists_the_reasons_of_every_kernel():
    problem = replace(PROBLEM, op="conv3d")
    with pytest.raises(UnsupportedError) as error:
        choose(problem, *call())
    for name in registered():
        assert f"{name}: it computes {registered()[name].op}, not conv3d" in str(error.value)
    assert "Add one with fxsparse.kernel.register" in str(error.value)


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
