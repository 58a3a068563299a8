"""Dense calls become kernel calls on packed weights; biases and activations go into them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse import kernel
from fxsparse.graph import fetch
from fxsparse.kernel import tolerance
from fxsparse.packed import PackedWeight
from fxsparse.passes import CollectWeights, Functionalize, FuseEpilogue, LowerInference
from fxsparse.pattern import Unstructured
from fxsparse.pipeline import Decision, PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


def lowered(model: nn.Module, x: Tensor, kernels: dict[str, str]) -> PassContext:
    """The model with these weights on these kernels, without measuring."""
    ctx = PassContext(None, "infer", capture(model.eval(), x, modes=("eval",)), Report(), x)
    run_passes([Functionalize(), CollectWeights()], ctx)
    for name in ctx.weights:
        entry = kernel.registered()[kernels.get(name, "dense")]
        ctx.decisions[name] = Decision(Unstructured(), 0.0, format=entry.format, kernel=entry.name)
    lower, fuse = LowerInference(), FuseEpilogue()
    gm = ctx.program.graphs["eval"]
    for current in (lower, fuse):
        rewrites = current.run(gm, ctx)
        gm.graph.lint()
        gm.recompile()
        ctx.report.passes.append({"name": current.name, "rewrites": rewrites})
    return ctx


def error(ctx: PassContext, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want, got = model(x), ctx.program.run("eval", x)
    return ((got - want).abs().max() / want.abs().max()).item()


def thinned(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[:, ::2] = 0
    return model


def rewrites(ctx: PassContext) -> dict[str, int]:
    return {row["name"]: row["rewrites"] for row in ctx.report.passes[-2:]}


def test_shows_the_graph_before_and_after() -> None:
    model, x = thinned(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))), torch.randn(3, 6)
    ctx = lowered(model, x, {"0.weight": "cpu-csr"})
    gm = ctx.program.graphs["eval"]
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [kernel.registered()["cpu-csr"].run, F.linear]
    read = [str(arg.target) for arg in calls[0].args[1:]]
    assert read == ["0.bias", "0.weight.values", "0.weight.crow", "0.weight.cols"]
    assert calls[0].kwargs == {"in_features": 6, "activation": "relu"}
    assert not gm.graph.find_nodes(op="call_module", target="1")
    assert rewrites(ctx) == {"lower-inference": 1, "fuse-epilogue": 1}
    assert error(ctx, model, x) <= 4 * tolerance(torch.float32, 6)


def test_the_dense_weight_leaves_the_tree_and_the_model_keeps_it() -> None:
    model = thinned(nn.Sequential(nn.Linear(6, 4)))
    weight = model[0].weight.detach().clone()
    ctx = lowered(model, torch.randn(3, 6), {"0.weight": "cpu-condensed"})
    packed = fetch(ctx.program.skeleton, "0.weight")
    assert isinstance(packed, PackedWeight)
    assert packed.shape == (4, 6)
    assert [name for name, _ in ctx.program.skeleton.named_parameters()] == ["0.bias"]
    assert list(ctx.program.skeleton.state_dict()) == ["0.bias", "0.weight.values", "0.weight.indices"]
    assert torch.equal(model[0].weight, weight)
    assert isinstance(model[0].weight, nn.Parameter)


def test_two_call_sites_read_one_packed_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).relu()) * 2

    model, x = thinned(Twice()), torch.randn(3, 6)
    ctx = lowered(model, x, {"fc.weight": "cpu-csr"})
    gm = ctx.program.graphs["eval"]
    assert len(gm.graph.find_nodes(op="get_attr", target="fc.weight.values")) == 1
    assert rewrites(ctx) == {"lower-inference": 2, "fuse-epilogue": 1}
    assert error(ctx, model, x) <= 4 * tolerance(torch.float32, 6)


def test_tied_names_hold_the_same_packed_weight() -> None:
    model = thinned(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    model[1].weight = model[0].weight
    x = torch.randn(3, 6)
    ctx = lowered(model, x, {"0.weight": "cpu-csr"})
    assert fetch(ctx.program.skeleton, "0.weight") is fetch(ctx.program.skeleton, "1.weight")
    assert rewrites(ctx)["lower-inference"] == 2
    assert error(ctx, model, x) <= 4 * tolerance(torch.float32, 6)


def test_a_transposed_weight_is_packed_as_the_op_reads_it() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    model, x = thinned(Product()), torch.randn(3, 6)
    ctx = lowered(model, x, {"weight": "cpu-csr"})
    assert fetch(ctx.program.skeleton, "weight").shape == (4, 6)
    assert "torch.t" not in ctx.program.graphs["eval"].code
    assert error(ctx, model, x) <= 4 * tolerance(torch.float32, 6)


def test_a_convolution_keeps_its_arguments() -> None:
    convolutions = (
        nn.Conv2d(6, 8, 3, (2, 1), "valid", 2, groups=2),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 3),
    )
    model, x = thinned(nn.Sequential(*convolutions)), torch.randn(2, 6, 9, 8)
    ctx = lowered(model, x, {"0.weight": "cpu-csr-conv", "3.weight": "cpu-csr-conv"})
    entry = kernel.registered()["cpu-csr-conv"]
    first, second = ctx.program.graphs["eval"].graph.find_nodes(op="call_function", target=entry.run)
    assert [str(arg.target).partition("weight.")[2] for arg in first.args[2:]] == [
        "values",
        "start",
        "columns",
    ]
    assert first.kwargs == {
        "kernel_size": (3, 3), "in_channels": 6, "stride": (2, 1), "padding": "valid", "dilation": (2, 2),
        "groups": 2, "activation": "relu",
    }  # fmt: skip
    assert second.kwargs["kernel_size"] == (3,)
    assert fetch(ctx.program.skeleton, "0.weight").shape == (8, 3, 3, 3)
    assert rewrites(ctx) == {"lower-inference": 2, "fuse-epilogue": 1}
    assert error(ctx, model, x) <= 4 * tolerance(torch.float32, 27)


def test_nothing_selected_changes_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU()), torch.randn(3, 6)
    ctx = lowered(model, x, {})
    assert rewrites(ctx) == {"lower-inference": 0, "fuse-epilogue": 0}
    assert isinstance(fetch(ctx.program.skeleton, "0.weight"), nn.Parameter)


def test_the_runner_accepts_both_passes() -> None:
    model, x = thinned(nn.Sequential(nn.Linear(6, 4), nn.ReLU())), torch.randn(3, 6)
    ctx = PassContext(None, "infer", capture(model, x, modes=("eval",)), Report(), x)
    run_passes([Functionalize(), CollectWeights()], ctx)
    ctx.decisions["0.weight"] = Decision(Unstructured(), 0.5, format="csr", kernel="cpu-csr")
    with pytest.raises(
        ValueError, match=r"pass 'lower-inference' must run after \['select-kernels', 'round-values'\]"
    ):
        run_passes([LowerInference(), FuseEpilogue()], ctx)
