"""Every parameter is selected, or has its reason, exactly once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import PlanError
from fxsparse.methods import static
from fxsparse.passes import CollectWeights, Functionalize
from fxsparse.pattern import NM, Unstructured
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.plans import Override, Plan
from fxsparse.report import Report
from fxsparse.trace import capture


def collected(model: nn.Module, inputs: Any = None, **wishes: Any) -> PassContext:
    plan = Plan(**{"sparsity": 0.5, "pattern": Unstructured(), "method": static("magnitude"), **wishes})
    ctx = PassContext(plan, "train", capture(model, inputs), Report())
    run_passes([Functionalize(), CollectWeights()], ctx)
    decided = [*ctx.weights, *ctx.untouched]
    assert sorted(decided) == sorted(name for name, _ in model.named_parameters())
    return ctx


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.raw = nn.Parameter(torch.randn(6, 8))
        self.experts = nn.Parameter(torch.randn(2, 8, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.lstm = nn.LSTM(8, 8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens) * self.scale)
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.lstm(torch.bmm(x, self.experts))[0]
        return self.head(x).sum(-1) + F.linear(x, self.raw).sum(-1)


def test_reasons() -> None:
    ctx = collected(Zoo(), torch.randint(0, 10, (2, 5)))
    assert list(ctx.weights) == ["raw", "attention.in_proj_weight", "attention.out_proj.weight"]
    assert ctx.weights["attention.in_proj_weight"].shape == (24, 8)
    reasons = {
        "embed.weight": "tied to the embedding 'embed.weight'",
        "norm.weight": "norm",
        "norm.bias": "norm",
        "attention.in_proj_bias": "bias",
        "experts": "3-D expert weight (op bmm)",
        "scale": "its op is neither a linear nor a convolution (mul)",
        "lstm.weight_ih_l0": "inside lstm (LSTM), which runs as one module",
        "unused.weight": "not read by the forward pass",
    }
    assert {name: ctx.untouched[name] for name in reasons} == reasons


def test_tied_linear_weights_are_one_spec_with_both_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    (spec,) = collected(model).weights.values()
    assert (spec.name, spec.aliases) == ("0.weight", ("1.weight",))


def test_groups_and_transposed_weights_are_facts() -> None:
    class Facts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, groups=2)
            self.w = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) @ self.w

    weights = collected(Facts(), torch.randn(2, 4, 8)).weights
    assert (weights["conv.weight"].groups, weights["w"].transposed, weights["w"].op) == (2, True, "linear")


def test_globs_exclude_names_and_modules_above() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    ctx = collected(model, exclude=("1.0.weight", "0"))
    assert list(ctx.weights) == ["1.1.weight"]
    assert list(ctx.excluded) == ["0.weight", "1.0.weight"]
    assert ctx.untouched["0.weight"] == "excluded by '0'"
    assert ctx.untouched["0.bias"] == "bias"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"exclude": ("haed",)}, r"exclude glob 'haed' matches no parameter; nearest names: \['head'"),
        ({"overrides": (Override("body.bias", sparsity=0.1),)}, "'body.bias' matches no selected weight"),
    ],
)
def test_unmatched_globs_are_named_with_their_neighbours(wish: dict[str, Any], message: str) -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 4))
    with pytest.raises(PlanError, match=message):
        collected(model, **wish)


def test_transposed_convolutions_take_unstructured_masks_only() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3))
    assert list(collected(model).weights) == ["0.weight"]
    assert collected(model, pattern=NM(2, 4)).untouched["0.weight"] == (
        "conv_transpose2d stores input channels first; only Unstructured() fits it"
    )


def test_the_walk_reaches_layers_by_their_type() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.raw = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.lin(x), self.raw) if x.sum().item() else x

    ctx = collected(Stubborn(), torch.randn(2, 4))
    assert ctx.program.tier == "walk"
    assert list(ctx.weights) == ["lin.weight"]
    assert (
        ctx.untouched["raw"]
        == "not the weight of a plain linear or convolution, as far as the module walk sees"
    )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_without_entries_is_untouched_in_every_mode():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 0))
    sparse = fxsparse.compile(model, Plan(sparsity=0.5), example_inputs=torch.randn(2, 8))
    inferred = fxsparse.compile(model, mode="infer", example_inputs=torch.randn(2, 8))
    for report in (sparse.report, inferred.report):
        assert {row["name"]: row["reason"] for row in report.untouched}["1.weight"] == "it has no entries"
    assert sparse.report.totals["nnz"] == 16
