"""What follows a sparse kernel call goes into it, where nothing else reads between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse import kernel
from fxsparse.kernel import tolerance
from fxsparse.passes import CollectWeights, Functionalize, FuseEpilogue, InferShapes, LowerInference
from fxsparse.passes.fuse_epilogue import activation_after
from fxsparse.pattern import Unstructured
from fxsparse.pipeline import Decision, PassContext
from fxsparse.report import Report
from fxsparse.trace import capture


class After(nn.Module):
    """A linear layer, then a function of its output."""

    def __init__(self, function: Callable[..., Tensor], bias: bool = True) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(6, 6, bias), function
        self.shift, self.gain = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(3, 6))
        with torch.no_grad():
            self.fc.weight[:, ::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.fc(x))


class Residual(After):
    """A function of the input and of a linear layer of it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.fc(x))


def fused(
    model: nn.Module, x: Tensor, name: str = "cpu-csr"
) -> tuple[int, torch.fx.GraphModule, PassContext]:
    ctx = PassContext(None, "infer", capture(model.eval(), x, modes=("eval",)), Report(), x)
    gm = ctx.program.graphs["eval"]
    for current in (Functionalize(), InferShapes(), CollectWeights()):
        current.run(gm, ctx)
    entry = kernel.registered()[name]
    ctx.decisions["fc.weight"] = Decision(Unstructured(), 0.5, format=entry.format, kernel=entry.name)
    LowerInference().run(gm, ctx)
    count = FuseEpilogue().run(gm, ctx)
    gm.graph.lint()
    gm.recompile()
    return count, gm, ctx


def kernel_call(gm: torch.fx.GraphModule, name: str = "cpu-csr") -> Any:
    (node,) = gm.graph.find_nodes(op="call_function", target=kernel.registered()[name].run)
    return node


def check_function(gm: torch.fx.GraphModule, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        want, got = model(x), gm(x)
    assert ((got - want).abs().max() / want.abs().max()).item() <= 4 * tolerance(torch.float32, 6)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda m, y: F.relu(y), "relu"),
        (lambda m, y: torch.relu(y), "relu"),
        (lambda m, y: y.relu(), "relu"),
        (lambda m, y: F.relu(y, inplace=True), "relu"),
        (lambda m, y: torch.ops.aten.relu.default(y), "relu"),
        (lambda m, y: F.gelu(y), "gelu"),
        (lambda m, y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
        (lambda m, y: torch.ops.aten.gelu.default(y, approximate="tanh"), "gelu_tanh"),
        (lambda m, y: F.silu(y), "silu"),
        (lambda m, y: torch.ops.aten.silu.default(y), "silu"),
        (lambda m, y: F.relu6(y), "relu6"),
        (lambda m, y: F.hardtanh(y, 0, 6), "relu6"),
        (lambda m, y: F.hardtanh(y, min_val=0.0, max_val=6.0), "relu6"),
        (lambda m, y: torch.ops.aten.hardtanh.default(y, 0.0, 6.0), "relu6"),
        (lambda m, y: torch.ops.aten.relu6.default(y), "relu6"),
        (lambda m, y: F.hardswish(y), "hardswish"),
        (lambda m, y: torch.ops.aten.hardswish.default(y), "hardswish"),
    ],
)
def test_fuses_every_spelling(function: Callable[..., Tensor], name: str) -> None:
    model, x = After(function), torch.randn(3, 6)
    count, gm, _ = fused(model, x)
    assert count == 1
    assert kernel_call(gm).kwargs == {"in_features": 6, "activation": name}
    assert [node.op for node in gm.graph.nodes if node.op.startswith("call")] == ["call_function"]
    check_function(gm, model, x)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.ReLU(), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(0, 6), "relu6"),
        (nn.Hardswish(), "hardswish"),
    ],
)
def test_fuses_modules(module: nn.Module, name: str) -> None:
    class Model(After):
        def __init__(self) -> None:
            super().__init__(lambda m, y: m.act(y))
            self.act = module

    model, x = Model(), torch.randn(3, 6)
    count, gm, _ = fused(model, x)
    assert (count, kernel_call(gm).kwargs) == (1, {"in_features": 6, "activation": name})
    check_function(gm, model, x)


@pytest.mark.parametrize("function", [lambda m, y: F.hardtanh(y), lambda m, y: F.hardtanh(y, 0.0)])
def test_other_clamps_stay(function: Callable[..., Tensor]) -> None:
    model, x = After(function), 8 * torch.randn(3, 6)
    count, gm, _ = fused(model, x)
    assert count == 0
    check_function(gm, model, x)


def test_fuses_an_added_bias_and_then_the_activation() -> None:
    model, x = After(lambda m, y: F.relu(m.shift + y), bias=False), torch.randn(3, 6)
    count, gm, _ = fused(model, x)
    assert count == 2
    assert str(kernel_call(gm).args[1].target) == "shift"
    check_function(gm, model, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: y + m.gain,  # a matrix is no bias
        lambda m, y: torch.add(y, m.shift, alpha=2),
        lambda m, y: y + y.sum(-1, keepdim=True),
        lambda m, y: y + 1,
    ],
)
def test_other_sums_stay(function: Callable[..., Tensor]) -> None:
    model, x = After(function, bias=False), torch.randn(3, 6)
    count, gm, _ = fused(model, x)
    assert count == 0
    assert kernel_call(gm).args[1] is None
    check_function(gm, model, x)


@pytest.mark.parametrize("function", [lambda x, y: x + y, lambda x, y: y + x, lambda x, y: torch.add(y, x)])
def test_fuses_a_residual(function: Callable[..., Tensor]) -> None:
    model, x = Residual(function), torch.randn(3, 6)
    count, gm, _ = fused(model, x)
    assert count == 1
    assert kernel_call(gm).kwargs["residual"].op == "placeholder"
    check_function(gm, model, x)


def test_fuses_a_residual_and_then_the_activation() -> None:
    model, x = Residual(lambda x, y: F.silu(x + y)), torch.randn(3, 6)
    count, gm, _ = fused(model, x)
    assert count == 2
    assert kernel_call(gm).kwargs["activation"] == "silu"
    check_function(gm, model, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: y + y,
        lambda x, y: x + F.gelu(y),  # the activation goes in, the sum after it does not
        lambda x, y: torch.add(y, x, alpha=2),
        lambda x, y: y + x[:1],  # of another shape
        lambda x, y: y + x.double(),  # of another dtype
        lambda x, y: y + torch.sigmoid(x),  # made after the call
        lambda x, y: (y + x) * y.sum(),  # two readers
    ],
)
def test_other_residuals_stay(function: Callable[..., Tensor]) -> None:
    model, x = Residual(function), torch.randn(3, 6)
    _, gm, _ = fused(model, x)
    assert "residual" not in kernel_call(gm).kwargs
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x))


def test_a_residual_that_is_changed_before_the_sum_stays() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        F.relu_(x)
        return y + x

    model, x = Residual(function), torch.randn(3, 6)
    _, gm, _ = fused(model, x.clone())
    assert "residual" not in kernel_call(gm).kwargs
    with torch.no_grad():
        torch.testing.assert_close(gm(x.clone()), model(x.clone()))


def test_a_second_bias_stays() -> None:
    model, x = After(lambda m, y: y + m.shift), torch.randn(3, 6)
    assert fused(model, x)[0] == 0


def test_an_output_with_two_readers_is_not_activated_and_the_note_says_so() -> None:
    model, x = After(lambda m, y: F.relu(y) + y), torch.randn(3, 6)
    count, gm, ctx = fused(model, x)
    assert count == 0
    assert kernel_call(gm).kwargs == {"in_features": 6}
    assert ctx.notes == ["csr_infer keeps its output as it is: relu is one of 2 readers"]
    check_function(gm, model, x)


def test_an_unknown_activation_stays() -> None:
    model, x = After(lambda m, y: torch.tanh(y)), torch.randn(3, 6)
    count, gm, _ = fused(model, x)
    assert count == 0
    assert activation_after(gm, kernel_call(gm)) == "no activation that kernels know reads it"


def test_a_vector_added_to_images_is_no_bias_of_channels() -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.shift = nn.Conv2d(6, 5, 3, bias=False), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.shift

    model, x = Images(), torch.randn(2, 6, 7, 7)
    with torch.no_grad():
        model.fc.weight[:, ::2] = 0
    count, gm, _ = fused(model, x, "cpu-csr-conv")
    assert count == 0
    check_function(gm, model, x)


class ImageResidual(nn.Module):
    """A convolution that is lowered, one that is not, and a function of x and both of them."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fc, self.other = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.function, self.act = function, nn.ReLU(inplace=True)
        with torch.no_grad():
            self.fc.weight[:, ::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (lambda m, x: F.relu(m.fc(x) + x), "relu"),
        (lambda m, x: F.silu(x + m.fc(x)), "silu"),
        (lambda m, x: m.act(torch.add(m.other(x), m.fc(x))), "relu"),
        (lambda m, x: torch.ops.aten.add.Tensor(m.fc(x), x), None),
        (lambda m, x: torch.tanh(m.fc(x) + x), None),
    ],
)
def test_fuses_residuals_of_images_in_both_orders(function: Any, activation: Any) -> None:
    model, x = ImageResidual(function), torch.randn(2, 6, 7, 5)
    count, gm, _ = fused(model, x, "cpu-csr-conv")
    assert count == 1 + (activation is not None)
    call = kernel_call(gm, "cpu-csr-conv")
    assert call.kwargs["residual"].name in ("x", "conv2d", "conv2d_1")
    assert call.kwargs.get("activation") == activation
    check_function(gm, model, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.fc(x) + x.mean(1, keepdim=True),
        lambda m, x: torch.add(m.fc(x), x, alpha=2),
        lambda m, x: m.fc(x) + 1,
        lambda m, x: (lambda y: y + y)(m.fc(x)),
        lambda m, x: (lambda y: y + F.relu(y))(m.fc(x)),
        lambda m, x: (lambda y: y + m.other(x))(m.fc(x)),  # it comes after the call
        lambda m, x: (lambda r: (m.fc(x), r.relu_())[0] + r)(m.other(x)),
        lambda m, x: torch.tanh(m.fc(x)) + x,
    ],
)
def test_other_residuals_of_images_stay(function: Any) -> None:
    model, x = ImageResidual(function), torch.randn(2, 6, 7, 5)
    _, gm, _ = fused(model, x, "cpu-csr-conv")
    assert "residual" not in kernel_call(gm, "cpu-csr-conv").kwargs
    check_function(gm, model, x)
