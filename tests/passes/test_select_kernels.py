"""The kernel of every weight, from measured times; every weight that stays dense says why."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse import choosing, kernel
from fxsparse.choosing import Choice
from fxsparse.kernel import Problem
from fxsparse.passes import (
    CollectWeights,
    DetectPattern,
    FoldBatchNorm,
    FoldMasks,
    Functionalize,
    InferShapes,
    RemoveIdentities,
    SelectKernels,
)
from fxsparse.passes.select_kernels import site_inputs
from fxsparse.pipeline import Decision, PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture

Calls = list[tuple[Problem, Tensor, str]]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Replaces measuring by given times, one dict for each call in turn, and returns what was asked."""

    def give(*answers: dict[str, float]) -> Calls:
        calls: Calls = []

        def choose(problem, x, weight, bias=None, activation="none", **options) -> Choice:
            calls.append((problem, x, activation))
            answer = answers[(len(calls) - 1) % len(answers)]
            fastest = min(answer, key=answer.__getitem__)
            return Choice(kernel.registered()[fastest], answer, {}, f"measured {fastest}")

        monkeypatch.setattr(choosing, "choose", choose)
        return calls

    return give


def selected(model: nn.Module, x: Tensor | None, **options) -> PassContext:
    ctx = PassContext(None, "infer", capture(model.eval(), x, modes=("eval",)), Report(), x)
    ctx.program.skeleton.eval()
    passes = (
        FoldMasks(),
        Functionalize(),
        CollectWeights(),
        RemoveIdentities(),
        InferShapes(),
        FoldBatchNorm(),
        DetectPattern(),
    )
    run_passes((*passes, SelectKernels(**options)), ctx)
    assert ctx.report.passes[-1]["rewrites"] == 0
    return ctx


def halved(model: nn.Module) -> Any:
    """The model with every other input of every weight at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[:, ::2] = 0
    return model


def test_takes_the_sparse_kernel_where_it_is_faster(times) -> None:
    times({"dense": 10.0, "cpu-csr": 5.0, "cpu-condensed": 4.0})
    decision = selected(halved(nn.Sequential(nn.Linear(6, 4))), torch.randn(2, 6)).decisions["0.weight"]
    assert (decision.storage, decision.format, decision.kernel) == ("compact", "condensed", "cpu-condensed")
    assert (decision.dense_us, decision.sparse_us, decision.reason) == (10.0, 4.0, "measured cpu-condensed")


def test_says_what_limits_the_kernel_it_takes_and_what_was_not_measured_again(times, monkeypatch) -> None:
    monkeypatch.setattr(
        choosing, "limit_us", lambda taken, problem: {"cpu-csr": 2.0, "dense": 7.0}[taken.name]
    )
    times({"dense": 10.0, "cpu-csr": 5.0})
    ctx = selected(halved(nn.Sequential(nn.Linear(6, 4))), torch.randn(2, 6))
    assert ctx.decisions["0.weight"].limit_us == 2.0
    assert not [note for note in ctx.report.passes[-1]["notes"] if "earlier process" in note]
    times({"dense": 5.0, "cpu-csr": 10.0})
    again = choosing.choose
    monkeypatch.setattr(
        choosing, "choose", lambda *call, **options: replace(again(*call, **options), recalled=True)
    )
    ctx = selected(halved(nn.Sequential(nn.Linear(6, 4))), torch.randn(2, 6))
    assert ctx.decisions["0.weight"].limit_us == 7.0
    assert "1 of 1 weights were measured by an earlier process" in ctx.report.passes[-1]["notes"]


def test_stays_dense_where_the_gain_is_below_five_percent(times) -> None:
    times({"dense": 10.0, "cpu-csr": 9.6})
    decision = selected(halved(nn.Sequential(nn.Linear(6, 4))), torch.randn(2, 6)).decisions["0.weight"]
    assert (decision.storage, decision.format, decision.kernel) == ("dense", "dense", "dense")
    assert (decision.dense_us, decision.sparse_us) == (10.0, 9.6)


def test_measures_on_the_real_input_with_the_activation_that_follows(times) -> None:
    calls = times({"dense": 10.0, "cpu-csr": 5.0})
    model, x = halved(nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2))), torch.randn(3, 5, 6)
    selected(model, x)
    (first, seen, activation), (second, hidden, none) = calls
    assert (first.batch, first.shape, first.nnz, first.fan_in, first.training) == (15, (4, 6), 12, 3, False)
    assert torch.equal(seen, x)
    assert activation == "gelu"
    assert torch.equal(hidden, F.gelu(model[0](x)))
    assert none == "none"
    assert second.batch == 15


def test_measures_convolutions_with_their_arguments_and_output_pixels(times) -> None:
    calls = times({"dense-conv": 10.0, "cpu-csr-conv": 5.0})
    convolutions = nn.Conv2d(2, 4, 3, (2, 1), (0, 1)), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2)
    model, x = halved(nn.Sequential(*convolutions)), torch.randn(3, 2, 7, 5)
    decision = selected(model, x).decisions["2.weight"]
    (first, seen, activation), (second, hidden, none) = calls
    assert (first.op, first.batch, first.shape, first.nnz) == ("conv2d", 3 * 3 * 5, (4, 2, 3, 3), 36)
    assert dict(first.arguments) == {
        "kernel_size": (3, 3), "in_channels": 2, "stride": (2, 1), "padding": (0, 1), "dilation": (1, 1),
        "groups": 1,
    }  # fmt: skip
    assert torch.equal(seen, x)
    assert torch.equal(hidden, model[0](x).relu())
    assert (activation, none, second.batch, dict(second.arguments)["groups"]) == ("relu", "none", 45, 2)
    assert (decision.storage, decision.format, decision.kernel) == ("compact", "csr", "cpu-csr-conv")


def test_two_call_sites_get_the_kernel_that_is_fastest_over_both(times) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x)[:1])

    # Alone the first site would take CSR and the second dense; over both CSR needs 13 us and dense 14 us.
    calls = times({"dense": 10.0, "cpu-csr": 4.0}, {"dense": 4.0, "cpu-csr": 9.0})
    decision = selected(halved(Twice()), torch.randn(4, 6)).decisions["fc.weight"]
    assert [problem.batch for problem, *_ in calls] == [4, 1]
    assert decision.kernel == "cpu-csr"
    assert decision.reason == "cpu-csr 13.0 us over its 2 call sites"
    assert (decision.dense_us, decision.sparse_us) == (14.0, 13.0)


def test_two_call_sites_use_only_kernels_that_run_at_both(times) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x)[:1])

    times({"dense": 10.0, "cpu-csr": 4.0, "cpu-condensed": 1.0}, {"dense": 4.0, "cpu-csr": 12.0})
    decision = selected(halved(Twice()), torch.randn(4, 6)).decisions["fc.weight"]
    assert decision.kernel == "dense"
    assert decision.reason == "no sparse kernel is faster over its 2 call sites"


class SlicedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.weight.chunk(2)
        return F.linear(x, first) + F.linear(x, second)


class ComputedPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, padding=x.shape[-1] - 4)


class ReadElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc.weight.sum()


@pytest.mark.parametrize(
    ("model", "name", "shape", "reason"),
    [
        (
            halved(nn.Sequential(nn.Conv3d(2, 4, 3))),
            "0.weight",
            (1, 2, 5, 5, 5),
            "there is no sparse conv3d kernel",
        ),
        (halved(SlicedWeight()), "weight", (2, 6), "an op reads only a part of it"),
        (
            halved(ComputedPadding()),
            "weight",
            (1, 2, 5),
            "the graph computes an argument of its convolution",
        ),
        (halved(ReadElsewhere()), "fc.weight", (2, 6), "something other than a linear op reads it"),
        (
            halved(nn.Sequential(nn.Linear(6, 4))),
            "0.weight",
            None,
            "not measured: there are no example inputs",
        ),
    ],
)
def test_says_why_a_weight_is_not_measured(times, model, name, shape, reason) -> None:
    calls = times({"dense": 10.0, "cpu-csr": 1.0})
    decision = selected(model, None if shape is None else torch.randn(shape)).decisions[name]
    assert (decision.kernel, decision.reason) == ("dense", reason)
    assert decision.dense_us is None
    assert calls == []


def test_weights_given_up_and_weights_without_zeros_get_the_fastest_dense_kernel(times) -> None:
    times({"dense": 10.0, "onednn": 5.0, "cpu-csr": 1.0})
    model = nn.Sequential(halved(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))), nn.Linear(4, 4))
    decisions = selected(model, torch.randn(2, 6), keep_dense={"0.0.weight": "given up"}).decisions
    assert {name: (d.kernel, d.format, d.reason) for name, d in decisions.items()} == {
        "0.0.weight": ("onednn", "dense", "given up"),
        "0.1.weight": ("cpu-csr", "csr", "measured cpu-csr"),
        "1.weight": ("onednn", "dense", "it has no zeros"),
    }
    times({"dense": 5.0, "onednn": 10.0, "cpu-csr": 7.0})
    decisions = selected(model, torch.randn(2, 6)).decisions
    assert {d.kernel for d in decisions.values()} == {"dense"}


def test_a_transposed_weight_is_measured_as_the_op_reads_it(times) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(6)[:, :4].clone())

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    calls = times({"dense": 10.0, "cpu-csr": 1.0})
    assert selected(Product(), torch.randn(2, 6)).decisions["weight"].kernel == "cpu-csr"
    assert calls[0][0].shape == (4, 6)


def test_inputs_are_seen_before_an_op_changes_them_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            return self.fc(y) + y.zero_()

    x = torch.randn(2, 4)
    ctx = PassContext(None, "infer", capture(InPlace(), x, modes=("eval",)), Report(), x)
    run_passes([Functionalize()], ctx)
    gm = ctx.program.graphs["eval"]
    (node,) = gm.graph.find_nodes(op="call_function", target=F.linear)
    assert torch.equal(site_inputs(gm, ctx, [node])[node], x)


def test_every_weight_is_decided_with_the_real_kernels() -> None:
    model = halved(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)))
    decisions: dict[str, Decision] = selected(model, torch.randn(1, 32)).decisions
    assert all(
        d.reason and d.dense_us is not None and d.kernel in kernel.registered() for d in decisions.values()
    )
