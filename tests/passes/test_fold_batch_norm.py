"""BatchNorm disappears into the layer before it, only where that is right."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.graph import argument, fetch
from fxsparse.kernel import tolerance
from fxsparse.passes import CollectWeights, FoldBatchNorm, Functionalize, InferShapes, RemoveIdentities
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


def lived(model: nn.Module) -> Any:
    """The model with statistics, scales and shifts as training leaves them, negative scales among them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.get_buffer("running_var").uniform_(0.2, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def folded(model: nn.Module, x: Tensor) -> PassContext:
    ctx = PassContext(None, "infer", capture(model, x, modes=("eval",)), Report(), x)
    ctx.program.skeleton.eval()
    run_passes([Functionalize(), CollectWeights(), RemoveIdentities(), InferShapes(), FoldBatchNorm()], ctx)
    return ctx


def rewrites(ctx: PassContext) -> int:
    return ctx.report.passes[-1]["rewrites"]


def notes(ctx: PassContext) -> list[str]:
    return ctx.report.passes[-1]["notes"]


def relative_error(ctx: PassContext, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want, got = model(x), ctx.program.run("eval", x)
    return ((got - want).abs().max() / want.abs().max()).item()


def test_shows_the_graph_before_and_after() -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 6, 6)
    before = capture(model, x, modes=("eval",)).graphs["eval"].code
    assert 'getattr(self, "1")(' in before
    ctx = folded(model, x)
    assert rewrites(ctx) == 1
    code = ctx.program.graphs["eval"].code
    assert 'getattr(self, "1")' not in code
    assert 'getattr(self, "0").bias' in code
    assert relative_error(ctx, model, x) <= 4 * tolerance(torch.float32, 27)


def test_weight_and_bias_are_the_formula_by_hand() -> None:
    # gamma 3, beta 1, mean 2, var 3, eps 1: scale 3/2; weight 4 -> 6; bias (5 - 2) * 3/2 + 1 = 5.5
    conv, norm = nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1, eps=1.0)
    for module, weight, bias in ((conv, 4.0, 5.0), (norm, 3.0, 1.0)):
        nn.init.constant_(module.get_parameter("weight"), weight)
        nn.init.constant_(module.get_parameter("bias"), bias)
    norm.get_buffer("running_mean").fill_(2.0)
    norm.get_buffer("running_var").fill_(3.0)
    tree = folded(nn.Sequential(conv, norm), torch.randn(1, 1, 5)).program.skeleton
    assert fetch(tree, "0.weight").item() == 6.0
    assert fetch(tree, "0.bias").item() == 5.5


def test_zeros_stay_exact_and_the_model_is_untouched() -> None:
    model, x = lived(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = fetch(folded(model, x).program.skeleton, "0.weight")
    assert torch.equal(new == 0, model[0].weight == 0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_tensors_of_a_folded_norm_are_dropped_and_told() -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    ctx = folded(model, torch.randn(1, 3, 5, 5))
    assert list(ctx.program.skeleton.state_dict()) == ["0.weight", "0.bias"]
    assert ctx.untouched == {
        "0.bias": "bias",
        "1.weight": "folded into 0.weight",
        "1.bias": "folded into 0.weight",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_norm_without_scales_folds_in_every_dtype(dtype: torch.dtype) -> None:
    model = lived(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, affine=False))).to(dtype)
    x = torch.randn(2, 3, 9, dtype=dtype)
    ctx = folded(model, x)
    assert rewrites(ctx) == 1
    # three roundings to the dtype: of the new weight, of the new bias, and of the output
    assert relative_error(ctx, model, x) <= 3 * tolerance(dtype, 9)


class TwoSites(nn.Module):
    """One convolution, called twice with a norm after each call: folding either would scale both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x))))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class Tied(nn.Module):
    """Two modules that share a weight, one of them with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def flat_variance() -> nn.Module:
    norm = nn.BatchNorm2d(3, eps=1e-80)
    norm.get_buffer("running_var").zero_()
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lived(TwoSites()), "first stays: conv.weight has 2 call sites"),
        (lived(Tied()), "norm stays: a.weight has 2 call sites"),
        (
            lived(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(3))),
            "1 stays: a linear layer's channels are",
        ),
        (lived(TwoReaders()), "norm stays: the output of conv2d has 2 readers"),
        (lived(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))), "1 stays: no convolution or linear layer with"),
        (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
            "1 stays: it normalises",
        ),
        (lived(nn.Sequential(nn.Conv2d(3, 3, 1), ScaledNorm(3))), "1 stays: ScaledNorm overrides forward"),
        (lived(nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3))), "1 stays: no convolution"),
        (flat_variance(), "1 stays: the folded weight does not fit torch.float32"),
    ],
)
def test_refuses_with_a_reason(model: nn.Module, reason: str) -> None:
    ctx = folded(model, torch.randn(2, 3, 4, 4))
    assert rewrites(ctx) == 0
    assert notes(ctx)[0].startswith(reason)


def test_a_norm_that_serves_two_convolutions_folds_into_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.b(self.norm(self.a(x))))

    model, x = lived(Shared()), torch.randn(2, 3, 4, 4)
    ctx = folded(model, x)
    assert rewrites(ctx) == 2
    assert relative_error(ctx, model, x) <= 4 * tolerance(torch.float32, 6)


def test_a_bias_that_another_layer_reads_keeps_its_value() -> None:
    class SharedBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)))

    model, x = lived(SharedBias()), torch.randn(2, 3, 4, 4)
    ctx = folded(model, x)
    assert rewrites(ctx) == 1
    assert torch.equal(fetch(ctx.program.skeleton, "b.bias"), model.b.bias)
    assert relative_error(ctx, model, x) <= 4 * tolerance(torch.float32, 6)


class RawNorm(nn.Module):
    """``F.batch_norm`` on tensors of the model."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gain = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain, None, False, 0.1, 1e-3)


def test_folds_the_functional_form() -> None:
    model, x = RawNorm().eval(), torch.randn(2, 3, 5, 5)
    ctx = folded(model, x)
    assert rewrites(ctx) == 1
    assert "batch_norm" not in ctx.program.graphs["eval"].code
    assert relative_error(ctx, model, x) <= 4 * tolerance(torch.float32, 27)


def test_folds_the_exported_form() -> None:
    model, x = RawNorm().eval(), torch.randn(2, 3, 5, 5)
    ctx = PassContext(None, "infer", capture(model, x, modes=("eval",)), Report(), x)
    gm = ctx.program.graphs["eval"]
    (node,) = gm.graph.find_nodes(op="call_function", target=F.batch_norm)
    mean, var, gain = (*node.args[1:3], argument(node, 3, "weight"))
    node.target, node.kwargs = torch.ops.aten.batch_norm.default, {}
    node.args = (node.args[0], gain, None, mean, var, False, 0.1, 1e-3, False)
    run_passes([Functionalize(), CollectWeights(), RemoveIdentities(), InferShapes(), FoldBatchNorm()], ctx)
    assert rewrites(ctx) == 1
    assert relative_error(ctx, model, x) <= 4 * tolerance(torch.float32, 27)


def test_the_activation_inside_timms_norm_is_kept() -> None:
    layers = pytest.importorskip("timm.layers")
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4, act_layer=nn.SiLU)))
    x = torch.randn(2, 3, 6, 6)
    ctx = folded(model, x)
    assert rewrites(ctx) == 1
    assert 'getattr(self, "1").act(' in ctx.program.graphs["eval"].code
    assert relative_error(ctx, model, x) <= 4 * tolerance(torch.float32, 27)


def test_folds_into_a_linear_layer() -> None:
    model, x = lived(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))), torch.randn(5, 6)
    ctx = folded(model, x)
    assert rewrites(ctx) == 1
    assert relative_error(ctx, model, x) <= 4 * tolerance(torch.float32, 6)


def test_a_folded_convolution_keeps_the_shapes_that_flops_are_counted_by():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    fast = fxsparse.compile(model, mode="infer", example_inputs=torch.randn(1, 3, 8, 8))
    [row] = fast.report.to_dict()["layers"]
    assert row["flops_dense"] == 2 * 4 * 3 * 9 * 36
