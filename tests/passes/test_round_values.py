"""Weights decided for narrow values become what those stand for, and the report knows what that costs."""

import pytest
import torch
from torch import nn

from fxsparse import choosing, kernel
from fxsparse.choosing import Choice
from fxsparse.formats import narrow
from fxsparse.graph import fetch
from fxsparse.passes import inference_pipeline
from fxsparse.passes.round_values import RoundValues
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


@pytest.fixture(autouse=True)
def csr_wins(monkeypatch):
    """cpu-csr-int8 is the fastest where it is a candidate."""

    def choose(problem, x, weight, bias=None, activation="none", **options) -> Choice:
        end = "" if problem.op == "linear" else "-conv"
        times = {f"dense{end}": 9.0, f"cpu-csr{end}": 5.0} | ({"cpu-csr-int8": 2.0} if problem.values else {})
        return Choice(kernel.registered()[min(times, key=times.__getitem__)], times, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)


def before_packing(model: nn.Module, x: torch.Tensor, values: torch.dtype | None = torch.int8) -> PassContext:
    ctx = PassContext(None, "infer", capture(model.eval(), x, modes=("eval",)), Report(), x)
    ctx.program.skeleton.eval()
    ctx.values_dtype = values
    at = next(i for i, p in enumerate(inference_pipeline) if isinstance(p, RoundValues))
    run_passes(inference_pipeline[: at + 1], ctx)
    return ctx


def sparse(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand_like(parameter) < 0.5
    return model


def test_a_weight_becomes_what_its_values_stand_for_with_its_error():
    model, x = sparse(nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 25))), torch.randn(4, 30)
    kept = {name: p.clone() for name, p in model.named_parameters()}
    ctx = before_packing(model, x)
    for name in ("0.weight", "2.weight"):
        rounded = fetch(ctx.program.skeleton, name)
        torch.testing.assert_close(rounded.detach(), narrow.nearest(kept[name], torch.int8))
        assert not torch.equal(rounded, kept[name])
        assert ctx.decisions[name].values_dtype == torch.int8
    wanted, got = (
        x @ w.t() + kept["0.bias"] for w in (kept["0.weight"], fetch(ctx.program.skeleton, "0.weight"))
    )
    expected = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert ctx.decisions["0.weight"].values_error == pytest.approx(expected, rel=1e-2)
    assert ctx.report.passes[-1]["rewrites"] == 2
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters()), "the user's model changed"


def test_nothing_is_rounded_where_nothing_was_asked_for():
    model, x = sparse(nn.Sequential(nn.Linear(30, 20))), torch.randn(4, 30)
    ctx = before_packing(model, x, None)
    assert torch.equal(fetch(ctx.program.skeleton, "0.weight"), model[0].weight)
    assert ctx.report.passes[-1]["rewrites"] == 0
    assert ctx.decisions["0.weight"].values_error is None


def test_a_transposed_weight_is_rounded_by_its_outputs():
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(30, 20) * (torch.rand(30, 20) < 0.3))
            self.bias = nn.Parameter(torch.randn(20))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    model, x = Transposed(), torch.randn(4, 30)
    ctx = before_packing(model, x)
    expected = narrow.nearest(model.weight.detach().t(), torch.int8).t()
    torch.testing.assert_close(fetch(ctx.program.skeleton, "weight").detach(), expected)


def test_convolutions_and_numbers_that_are_not_finite_keep_their_values_and_say_why():
    model = sparse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)))
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    ctx = before_packing(model, torch.randn(2, 3, 6, 6))
    assert ctx.decisions["0.weight"].reason.endswith("values stay float32: no conv2d kernel stores int8")
    assert "some are not finite, so that int8 cannot scale them" in ctx.decisions["2.weight"].reason
    assert ctx.report.passes[-1]["rewrites"] == 0
