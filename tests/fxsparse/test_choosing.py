from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import choosing, machine
from fxsparse import kernel as kernels
from fxsparse.choosing import choose
from fxsparse.errors import UnsupportedError
from fxsparse.kernel import Entries, Problem, candidates, register, registered
from fxsparse.kernels import cpu
from fxsparse.testing import sparse_weight

ARGUMENTS = (("in_features", 48),)
PROBLEM = Problem("linear", (64, 48), 4, 300, torch.float32, torch.device("cpu"), False, None, ARGUMENTS)

CONVOLUTION = (
    ("stride", (1, 1)),
    ("padding", (1, 1)),
    ("dilation", (1, 1)),
    ("groups", 1),
    ("in_channels", 4),
    ("kernel_size", (3, 3)),
)
COMPILED = pytest.mark.skipif(cpu.availability() is not None, reason=str(cpu.availability()))


@pytest.fixture
def registry(monkeypatch):
    registered()  # the shipped ones first
    monkeypatch.setattr(kernels, "_REGISTRY", dict(kernels._REGISTRY))
    monkeypatch.setattr(choosing, "_CHOICES", {})


def call(dtype=torch.float32):
    weight = sparse_weight((64, 48), 0.1).to(dtype)
    return torch.randn(4, 48, dtype=dtype), weight, torch.randn(64, dtype=dtype)


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
    monkeypatch.setattr(choosing, "_CHOICES", {})
    monkeypatch.setattr(choosing, "_measured", None)
    second = choose(PROBLEM, x, weight, bias)
    assert (second.times_us, second.kernel, second.reason) == (first.times_us, first.kernel, first.reason)
    assert (first.recalled, second.recalled) == (False, True)
    assert choose(PROBLEM, x, weight, bias, advantage=1e-6).kernel.format == "dense"


def test_other_kernels_other_threads_or_other_code_are_measured_again(registry, monkeypatch):
    x, weight, bias = call()
    choose(PROBLEM, x, weight, bias, rounds=3)
    with monkeypatch.context() as edited:
        edited.setattr(machine, "sources_digest", lambda module: "edited")
        assert not choose(PROBLEM, x, weight, bias, rounds=3).recalled
    register(replace(registered()["dense"], name="new"))
    assert not choose(PROBLEM, x, weight, bias, rounds=3).recalled


def test_the_limit_is_the_longer_of_arithmetic_and_reading_at_the_highest_roofs(monkeypatch):
    rates = {"flops": (1e9, 4e9), "bytes": (1e9, 3e9)}
    read = []
    for module, place in ((machine, 0), (cpu, 1)):
        monkeypatch.setattr(module, "flops_per_second", lambda *_, place=place: rates["flops"][place])
        monkeypatch.setattr(
            module, "bytes_per_second", lambda size, place=place: read.append(size) or rates["bytes"][place]
        )
    entry = registered()["dense"]
    flops, moved = 2 * 4 * 64 * 48, 64 * 48 * 4
    assert choosing.limit_us(entry, PROBLEM) == pytest.approx(1e6 * flops / 4e9)
    assert choosing.limit_us(entry, replace(PROBLEM, batch=1)) == pytest.approx(1e6 * moved / 3e9)
    rates["flops"] = rates["bytes"] = (5e9, 0.0)  # without the C++ kernels
    assert choosing.limit_us(entry, PROBLEM) == pytest.approx(1e6 * flops / 5e9)
    assert choosing.limit_us(entry, replace(PROBLEM, shape=(640, 480))) > 0
    # No more than the weight has, and enough for a call of torch.
    assert set(read) == {1 << 14, 1 << 18, 1 << 20}


def test_training_problems_time_the_backward_too(registry):
    x, weight, bias = call()
    choice = choose(replace(PROBLEM, training=True), x, weight, bias, rounds=3)
    assert choice.kernel.name in ("dense-masked", "cpu-csr-train")
    assert "dense-masked" in choice.times_us


def test_a_sparse_kernel_has_to_be_clearly_faster(registry):
    x, weight, bias = call()
    register(replace(registered()["dense"], name="as-fast", format="csr"))
    choice = choose(PROBLEM, x, weight, bias, advantage=1e-6, rounds=3)
    assert choice.kernel.format == "dense"


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


@COMPILED
def test_complex_layers_stay_dense():
    model, x = nn.Linear(8, 8, dtype=torch.complex64).eval(), torch.randn(3, 8, dtype=torch.complex64)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    assert [row["kernel"] for row in fast.report.layers] == ["dense"]
    assert torch.equal(fast(x), model(x))


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


def test_nothing_to_run_lists_the_reasons_of_every_kernel():
    problem = replace(PROBLEM, op="conv3d")
    with pytest.raises(UnsupportedError) as error:
        choose(problem, *call())
    for name in registered():
        assert f"{name}: it computes {registered()[name].op}, not conv3d" in str(error.value)
    assert "Add one with fxsparse.kernel.register" in str(error.value)


def test_narrow_values_have_to_be_clearly_faster_than_the_weight_as_it_is():
    exact = {"dense": 20.0, "cpu-csr": 10.0, "cpu-striped": 12.0}
    assert choosing.taken_of(exact | {"cpu-csr-int8": 9.4, "cpu-striped-int8": 9.6}, 0.95) == (
        "cpu-csr-int8",
        "cpu-csr-int8 9.4 us, 1.06x of cpu-csr",
    )
    taken, reason = choosing.taken_of(exact | {"cpu-csr-int8": 9.6}, 0.95)
    assert taken == "cpu-csr"
    assert reason == "cpu-csr 10.0 us, 2.00x of dense; values stay as they are: cpu-csr-int8 9.6 us"
    taken, reason = choosing.taken_of({"dense": 5.0, "cpu-csr": 10.0, "cpu-csr-int8": 6.0}, 0.95)
    assert taken == "dense"
    assert reason.endswith("values stay as they are: cpu-csr-int8 6.0 us")
    assert choosing.taken_of({"dense": 5.0}, 0.95) == ("dense", "")


def test_a_result_that_is_not_a_number_is_wrong_unless_the_inputs_make_it_so(registry):
    x, weight, bias = call()
    right = registered()["dense"]

    def run(x, *weights, **given):
        return right.run(x, *weights, **given).index_fill(0, torch.tensor(1), float("nan"))

    register(replace(right, name="wrong", run=run))
    assert "wrong" in choose(PROBLEM, x, weight, bias, rounds=3).refusals
    choosing._CHOICES.clear()
    x[1] = float("nan")
    assert "dense" in choose(PROBLEM, x, weight, bias, "relu", rounds=3).times_us


@pytest.mark.parametrize("wrong_at", [0, -1])
@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_a_wrong_result_is_found_where_the_ends_of_many_rows_or_samples_are_checked(
    registry, monkeypatch, op, wrong_at
):
    monkeypatch.setattr(choosing, "_CHECKED_PRODUCTS", {True: 1, False: 1})
    shape, x = ((64, 48), torch.randn(9, 48)) if op == "linear" else ((8, 4, 3, 3), torch.randn(9, 4, 6, 6))
    weight = sparse_weight(shape, 0.1).float()
    arguments = ARGUMENTS if op == "linear" else CONVOLUTION
    problem = replace(PROBLEM, op=op, shape=shape, batch=9 if op == "linear" else 9 * 36, arguments=arguments)
    right = registered()["dense" if op == "linear" else "dense-conv"]

    def run(x, *weights, **given):
        output = right.run(x, *weights, **given)
        output[wrong_at] += 1
        return output

    register(replace(right, name="wrong", run=run))
    choice = choose(problem, x, weight, rounds=3)
    assert choice.refusals["wrong"][0].startswith("its result is wrong here: relative error")
    assert right.name in choice.times_us


def timed_convolutions(registry, monkeypatch):
    """[samples of each call of a kernel named "seen"]; all kernels are timed at 10 us."""
    seen = []
    right = registered()["dense-conv"]

    def run(x, *weights, **given):
        seen.append(len(x))
        return right.run(x, *weights, **given)

    register(replace(right, name="seen", run=run))
    monkeypatch.setattr(choosing, "interleaved_quartiles", lambda calls, **_: dict.fromkeys(calls, 10.0))
    return seen


def test_convolutions_of_large_batches_are_timed_on_a_few_samples_and_scaled(registry, monkeypatch):
    seen = timed_convolutions(registry, monkeypatch)
    weight, x = sparse_weight((8, 4, 3, 3), 0.1).float(), torch.randn(12, 4, 6, 6)

    def choice(samples, threads=1):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        problem = replace(PROBLEM, op="conv2d", shape=(8, 4, 3, 3), batch=samples * 36, arguments=CONVOLUTION)
        return choose(problem, x[:samples], weight)

    twelve = choice(12)
    assert seen == [choosing.TIMED_SAMPLES]
    assert twelve.times_us["seen"] == 30.0
    assert choice(8).times_us["seen"] == 20.0
    assert choice(4).times_us["seen"] == 10.0, "the same measurement"
    assert seen == [4]
    assert choice(3).times_us["seen"] == 10.0
    assert choice(12, threads=6).times_us["seen"] == 20.0
    assert seen == [4, 3, 6]


def test_one_image_rows_and_training_are_timed_whole(registry):
    conv = replace(PROBLEM, op="conv2d", shape=(8, 4, 3, 3), batch=9 * 36, arguments=CONVOLUTION)
    images = torch.randn(9, 4, 6, 6)
    for problem, x in [
        (conv, images[0]),
        (PROBLEM, torch.randn(9, 48)),
        (replace(conv, training=True), images),
    ]:
        assert choosing.some_samples(problem, x) == (problem, x, 1.0)
    part, x, scale = choosing.some_samples(conv, images)
    assert (part.batch, len(x), scale) == (4 * 36, 4, 9 / 4)


@COMPILED
def test_narrow_kernels_are_measured_against_the_weight_that_they_store(registry):
    x, weight, bias = call()
    problem = replace(PROBLEM, values=torch.int8)
    assert "cpu-csr-int8" in choose(problem, x, weight, bias, rounds=3).times_us
    assert "cpu-csr-int8" in choose(problem, x, entries_of(weight), bias, rounds=3).times_us
    assert "cpu-csr-int8" not in choose(PROBLEM, x, weight, bias, rounds=3).times_us


@COMPILED
def test_the_error_of_rounding_is_relative_to_the_largest_output():
    x, weight, bias = call()
    problem = replace(PROBLEM, values=torch.int8)
    want = F.relu(F.linear(x, weight, bias))
    got = F.relu(F.linear(x, choosing.stored(registered()["cpu-csr-int8"], weight), bias))
    expected = ((got - want).abs().max() / want.abs().max()).item()
    error = choosing.rounding_error(registered()["cpu-csr-int8"], problem, x, weight, bias, "relu")
    assert error == pytest.approx(expected, rel=1e-3)
    assert 1e-4 < error < 2e-2
    entries = choosing.stored(registered()["cpu-csr-int8"], entries_of(weight))
    assert torch.equal(entries.values, choosing.stored(registered()["cpu-csr-int8"], weight)[weight != 0])
    assert choosing.rounding_error(registered()["cpu-csr"], PROBLEM, x, weight, bias, "none") < 1e-6
