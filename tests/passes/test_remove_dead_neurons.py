"""Neurons that compute nothing leave the model, and the model computes what it did."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import fxsparse
from fxsparse import Plan
from fxsparse.graph import fetch
from fxsparse.methods import static
from fxsparse.passes import inference_pipeline
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture

PASSES = inference_pipeline[: [p.name for p in inference_pipeline].index("remove-dead-neurons") + 1]


def removed(model: nn.Module, x: Tensor) -> PassContext:
    """The model after the pass; the runner itself compares its function before and after."""
    ctx = PassContext(None, "infer", capture(model.eval(), x, modes=("eval",)), Report(), x)
    ctx.program.skeleton.eval()
    run_passes(PASSES, ctx)
    return ctx


def rewrites(ctx: PassContext) -> int:
    return ctx.report.passes[-1]["rewrites"]


def notes(ctx: PassContext) -> list[str]:
    return ctx.report.passes[-1]["notes"]


def neurons(ctx: PassContext) -> dict[str, int]:
    return {name: weight.neurons for name, weight in ctx.shrunk.items() if weight.neurons}


def shapes(ctx: PassContext) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in ctx.program.skeleton.state_dict().items()}


def error(ctx: PassContext, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        want, got = model(x), ctx.program.run("eval", x)
    return ((got - want).abs().max() / want.abs().max()).item()


EXACT = 1e-12
"""fp64 on every model: roundings only, so that an error of the first layer is seen at the output."""


def with_zero_rows(model: nn.Module, rows: dict[str, Any]) -> nn.Module:
    with torch.no_grad():
        for name, dead in rows.items():
            fetch(model, name)[dead] = 0
    return model.double()


def mlp(*between: nn.Module, bias: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), *between, nn.Linear(6, 3, bias=bias))
    return with_zero_rows(model, {"0.weight": [1, 4]})


# -- what goes, and the constant that stays behind -----------------------------------------------------------


def test_shows_the_model_before_and_after() -> None:
    model, x = mlp(nn.GELU(), bias=False), torch.randn(4, 5).double()
    first, last = fetch(model, "0.weight").clone(), fetch(model, "2.weight").clone()
    ctx = removed(model, x)
    assert rewrites(ctx) == 2
    assert neurons(ctx) == {"0.weight": 2}
    tree, kept = ctx.program.skeleton, [0, 2, 3, 5]
    assert torch.equal(fetch(tree, "0.weight"), first[kept])
    assert torch.equal(fetch(tree, "2.weight"), last[:, kept])
    assert fetch(tree, "0.bias").shape == (4,)
    # by hand: what the two dead neurons gave the layer that had no bias
    constant = F.gelu(model.get_parameter("0.bias"))[[1, 4]]
    torch.testing.assert_close(fetch(tree, "2.bias"), last[:, [1, 4]] @ constant, rtol=1e-14, atol=1e-16)
    assert 'getattr(self, "2").bias' in ctx.program.graphs["eval"].code
    assert error(ctx, model, x) <= EXACT
    assert ctx.weights["2.weight"].shape == (3, 4)
    assert notes(ctx) == []


def test_the_model_passed_in_is_untouched() -> None:
    model, x = mlp(nn.ReLU()), torch.randn(2, 5).double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    removed(model, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_without_zeros_nothing_changes() -> None:
    ctx = removed(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)).double(), torch.randn(2, 5).double())
    assert (rewrites(ctx), notes(ctx), ctx.shrunk) == (0, [], {})


def test_outputs_that_nobody_reads_go_too() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double(), torch.randn(2, 5).double()
    with torch.no_grad():
        model[2].weight[:, [0, 5]] = 0
    ctx = removed(model, x)
    assert neurons(ctx) == {"0.weight": 2}
    assert error(ctx, model, x) <= EXACT


class Chosen(nn.Module):
    """Chooses by a condition, whose constants are no numbers but truths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.where(y > 0.1, y, 0.5))


def test_constants_go_through_a_choice() -> None:
    model, x = with_zero_rows(Chosen(), {"first.weight": [1, 4]}), torch.randn(4, 5).double()
    ctx = removed(model, x)
    assert neurons(ctx) == {"first.weight": 2}
    assert error(ctx, model, x) <= EXACT


class Overwriting(nn.Module):
    """Changes what the third layer reads, too."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.write, self.first = write, nn.Linear(5, 6)
        self.second, self.third = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(self.write(y)) + self.third(y)


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.sigmoid_(),
        lambda y: F.hardtanh(y, 0.1, 0.2, inplace=True),
        lambda y: F.hardtanh(torch.flatten(input=y, start_dim=1), 0.1, 0.2, inplace=True),
        lambda y: torch.add(y, 1, out=y),
    ],
    ids=["method", "function", "view by name", "out"],
)
@torch.no_grad()  # which `out` asks for
def test_what_is_overwritten_is_no_constant(write: Callable[[Tensor], Tensor]) -> None:
    model, x = with_zero_rows(Overwriting(write), {"first.weight": [1, 4]}), torch.randn(4, 5).double()
    assert error(removed(model, x), model, x) <= EXACT


def test_a_death_spreads_both_ways_to_a_fixed_point() -> None:
    # Row 0 of the last but one dies because all it reads is dead; then the first has an output that nobody reads.
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[2].weight[0, 1:] = 0
        model[0].weight[0] = 0
        model[4].weight[:, 2] = 0
        model[2].weight[[1, 3], 3] = 0
        model[2].weight[0, 3] = 0
    x = torch.randn(3, 4).double()
    ctx = removed(model, x)
    assert neurons(ctx) == {"0.weight": 2, "2.weight": 2}
    assert error(ctx, model, x) <= EXACT


def test_a_layer_keeps_one_row_where_all_are_dead() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(4, 5).double()
    ctx = removed(with_zero_rows(model, {"0.weight": [*range(6)]}), x)
    assert neurons(ctx) == {"0.weight": 5}
    assert notes(ctx)[0].startswith("0.weight: 1 of 1 rows of zeros stay: 1 since it is the last one")
    assert error(ctx, model, x) <= EXACT


# -- what lies between ---------------------------------------------------------------------------------------


def lived(model: nn.Module) -> Any:
    """Norms with statistics, scales and shifts as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.get_buffer("running_mean").normal_(0, 0.3)
            module.get_buffer("running_var").uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def test_a_norm_that_could_not_be_folded_shrinks() -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)]
    model = with_zero_rows(lived(nn.Sequential(*layers)), {"0.weight": [0, 1, 5]})
    x = torch.randn(2, 3, 5, 5).double()
    ctx = removed(model, x)
    assert neurons(ctx) == {"0.weight": 3}
    assert shapes(ctx)["2.running_var"] == shapes(ctx)["2.bias"] == (3,)
    assert "BatchNorm2d(3," in repr(ctx.program.skeleton)
    assert error(ctx, model, x) <= EXACT


def test_a_flattened_channel_is_a_block_of_columns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    model = with_zero_rows(model, {"0.weight": [1, 2]})
    fetch(model, "0.bias").data.fill_(0.5)
    before, x = fetch(model, "4.weight").clone(), torch.randn(2, 3, 6, 6).double()
    ctx = removed(model, x)
    kept = [*range(4), *range(12, 16)]
    assert torch.equal(fetch(ctx.program.skeleton, "4.weight"), before[:, kept])
    assert error(ctx, model, x) <= EXACT


def test_a_weight_that_is_stored_transposed_loses_columns() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 2))
            self.bias = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(torch.addmm(self.bias, x, self.first)) @ self.last

    model, x = with_zero_rows(Products(), {"first": (slice(None), [2, 3])}), torch.randn(3, 4).double()
    ctx = removed(model, x)
    assert neurons(ctx) == {"first": 2}
    assert shapes(ctx)["first"] == (4, 4)
    assert shapes(ctx)["last"] == (4, 2)
    assert error(ctx, model, x) <= EXACT


def test_the_activation_inside_timms_norm_is_followed() -> None:
    layers = pytest.importorskip("timm.layers")
    norm = lived(nn.Sequential(layers.BatchNormAct2d(6, act_layer=nn.SiLU)))
    model = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.Conv2d(6, 2, 3))
    model, x = with_zero_rows(model, {"0.weight": [0, 4]}), torch.randn(2, 3, 5, 5).double()
    ctx = removed(model, x)
    assert neurons(ctx) == {"0.weight": 2}
    assert error(ctx, model, x) <= EXACT


class Residual(nn.Module):
    """Two branches that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.a(x) + self.b(x)))


def test_a_sum_takes_only_what_is_dead_in_both_and_says_so() -> None:
    model, x = (
        with_zero_rows(Residual(), {"a.weight": [0, 1, 2], "b.weight": [1, 5]}),
        torch.randn(2, 4).double(),
    )
    ctx = removed(model, x)
    assert neurons(ctx) == {"a.weight": 1, "b.weight": 1}
    why = "what the next layer reads of it is not constant: live channels are added, or zeros at a border"
    assert notes(ctx) == [
        f"a.weight: 2 of 5 rows of zeros stay: 2 since {why}",
        f"b.weight: 1 of 5 rows of zeros stay: 1 since {why}",
    ]
    assert error(ctx, model, x) <= EXACT


class Gate(nn.Module):
    """Squeeze and excitation: channels times numbers that another layer computes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.out = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.out(y * gate)


def test_a_product_with_zero_takes_the_row_of_the_other_factor_along() -> None:
    model = with_zero_rows(Gate(), {"conv.weight": [0, 3]})
    fetch(model, "conv.bias").data.copy_(torch.tensor([-1, 1, 1, 0.0, 1, 1]))
    x = torch.randn(2, 3, 4, 4).double()
    ctx = removed(model, x)
    assert neurons(ctx) == {"conv.weight": 2, "excite.weight": 2}  # rows of excite that were not zero
    assert shapes(ctx)["squeeze.weight"] == (4, 4, 1, 1)
    assert error(ctx, model, x) <= EXACT


class Pieces(nn.Module):
    """Chunks of unequal width after shrinking, then a concatenation, then a view of a written size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(3, 3, 1)
        self.out = nn.Linear(6 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        return self.out(torch.cat([self.b(torch.tanh(left)), right], 1).view(-1, 24))


def test_chunks_become_splits_and_written_sizes_are_rewritten() -> None:
    model = with_zero_rows(Pieces(), {"a.weight": [0, 1, 5], "b.weight": [2]})
    x = torch.randn(3, 2, 2, 2).double()
    ctx = removed(model, x)
    assert neurons(ctx) == {"a.weight": 3, "b.weight": 1}
    code = ctx.program.graphs["eval"].code
    assert "split(" in code
    assert "[1, 2], 1)" in code
    assert "view([-1, 16])" in code
    for batch in (1, 3, 7):
        assert error(ctx, model, torch.randn(batch, 2, 2, 2).double()) <= EXACT


# -- borders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_data", [True, False])
def test_pieces_along_a_batch_of_any_size_keep_their_neurons(by_data: bool) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            sizes = x[:, 0].long().unique(return_counts=True)[1] if by_data else None
            pieces = hidden.chunk(2) if sizes is None else hidden.split(sizes.tolist())
            return self.last(pieces[0]) + self.last(pieces[1]).sum(0)

    model, x = (
        with_zero_rows(Halves(), {"first.weight": [0, 1]}),
        torch.arange(6.0).div(3).floor()[:, None].expand(6, 4).double(),
    )
    assert error(removed(model, x), model, x) == 0


def padded(bias: list[float]) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1))
    model = with_zero_rows(model, {"0.weight": [0, 2, 3]})
    fetch(model, "0.bias").data.copy_(torch.tensor(bias))
    return model


def test_a_constant_zero_passes_a_padded_border() -> None:
    model, x = padded([-1.0, 1, 0, -2, 1]), torch.randn(2, 2, 5, 4).double()
    ctx = removed(model, x)
    assert neurons(ctx) == {"0.weight": 3}
    assert "2.bias" in ctx.program.skeleton.state_dict()
    assert error(ctx, model, x) <= EXACT


def test_other_constants_share_one_row_at_a_padded_border() -> None:
    model, x = padded([0.5, 1, -1, 2.0, 1]), torch.randn(2, 2, 5, 4).double()
    old = fetch(model, "2.weight").clone()
    ctx = removed(model, x)
    assert neurons(ctx) == {"0.weight": 2}  # of three, one stays for all
    new = fetch(ctx.program.skeleton, "2.weight")
    torch.testing.assert_close(new[:, 1], old[:, 3] + old[:, 0] * 0.25)
    reason = "with it 2.weight tells a constant from the zeros at the border"
    assert notes(ctx) == [f"0.weight: 1 of 3 rows of zeros stay: 1 since {reason}"]
    for size in (1, 2, 7):
        assert error(ctx, model, torch.randn(1, 2, size, size).double()) <= EXACT


@pytest.mark.parametrize("counted", [True, False])
def test_an_average_pool_that_counts_its_padding_is_a_border(counted: bool) -> None:
    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=counted)
    model = with_zero_rows(nn.Sequential(nn.Conv2d(2, 4, 1), pool, nn.Conv2d(4, 2, 1)), {"0.weight": [1]})
    x = torch.randn(1, 2, 4, 4).double()
    ctx = removed(model, x)
    assert neurons(ctx) == ({} if counted else {"0.weight": 1})
    assert len(notes(ctx)) == counted
    assert error(ctx, model, x) <= EXACT


# -- groups --------------------------------------------------------------------------------------------------


def grouped(groups: int, dead: list[int]) -> nn.Module:
    layers = [nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=groups), nn.ReLU(), nn.Conv2d(6, 2, 1)]
    return with_zero_rows(nn.Sequential(*layers), {"2.weight": dead})


@pytest.mark.parametrize(
    ("groups", "dead", "gone", "left"),
    [(6, [0, 4], {"0.weight": 2, "2.weight": 2}, 4), (3, [2, 3, 4], {"0.weight": 2, "2.weight": 2}, 2)],
)
def test_a_group_goes_whole(groups: int, dead: list[int], gone: dict[str, int], left: int) -> None:
    model, x = grouped(groups, dead), torch.randn(2, 2, 5, 5).double()
    ctx = removed(model, x)
    assert neurons(ctx) == gone
    assert f"groups = {left}" in ctx.program.graphs["eval"].code
    assert ctx.weights["2.weight"].groups == left
    assert error(ctx, model, x) <= EXACT
    whole = "what it is added to or grouped with goes whole, and has live rows"
    kept = [] if groups == 6 else [f"2.weight: 1 of 4 rows of zeros stay: 1 since {whole}"]
    assert notes(ctx) == kept


# -- what stays ----------------------------------------------------------------------------------------------


class TwoSites(nn.Module):
    """One layer, called on two different inputs, after one with dead rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x))) * self.out(torch.tanh(self.b(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.norm(y))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(y) + self.out(y.sigmoid_())


class ReadsSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.out(y) / y.shape[1]


class InBuffers(nn.Module):
    """Multiplies by what is no Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("weight", torch.randn(5, 5).double())
        self.register_buffer("bias", torch.randn(5).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.linear(self.a(x), self.weight, self.bias))  # type: ignore[arg-type]


class Reshaping(nn.Module):
    """Multiplies by a Parameter that a reshape hides, as nn.LinearCrossEntropyLoss does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.weight.reshape(3, 5))


class Conditional(nn.Module):
    """Multiplies by what it computes from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Linear(4, 5), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.weight * x.mean())


class Adjoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 5), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).H)


def test_neurons_in_buffers_stay() -> None:
    model, x = with_zero_rows(InBuffers(), {"out.weight": (slice(None), [2])}), torch.randn(2, 4).double()
    ctx = removed(model, x)
    assert (rewrites(ctx), ctx.shrunk) == (0, {})
    assert error(ctx, model, x) <= EXACT


def between(module: nn.Module, out: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), module, nn.Linear(out, 2))


class ComputedSize(nn.Module):
    """The size that the view asks for is that of the input, by chance also the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).view(-1, x.size(1)))


@pytest.mark.parametrize(
    ("model", "rows", "x", "reason"),
    [
        (nn.Linear(4, 5), {"weight": [0]}, (2, 4), "it is an output of the model"),
        (TwoSites(), {"a.weight": [1], "b.weight": [1]}, (2, 4), "out.weight has more than one call site"),
        (Attention(), {"qkv.weight": [3]}, (2, 6, 8), "view (view) cuts it up or merges it"),
        (InPlace(), {"a.weight": [1]}, (2, 4), "sigmoid_ changes it in place, which others see"),
        (ReadsSize(), {"a.weight": [1]}, (2, 4), "getattr_1 reads its size"),
        (
            InBuffers(),
            {"a.weight": [1]},
            (2, 4),
            "weight or its bias is not read as a Parameter, which a constant could be folded into",
        ),
        (
            Reshaping(),
            {"a.weight": [1]},
            (2, 4),
            "weight or its bias is not read as a Parameter, which a constant could be folded into",
        ),
        (Conditional(), {"a.weight": [1]}, (2, 4), "linear (linear) is not known to keep channels apart"),
        (Adjoint(), {"a.weight": [1]}, (2, 4), "getattr (getattr_1) is not known to keep channels apart"),
        (ComputedSize(), {"a.weight": [1]}, (2, 4), "view (view) cuts it up or merges it"),
        (between(nn.LayerNorm(6)), {"0.weight": [2]}, (2, 4), "LayerNorm 1 mixes its channels"),
        (between(nn.GroupNorm(1, 3)), {"0.weight": [2]}, (2, 3, 4), "GroupNorm 1 mixes its channels"),
        (
            between(nn.BatchNorm1d(3, track_running_stats=False)),
            {"0.weight": [2]},
            (2, 3, 4),
            "BatchNorm1d 1 takes statistics of the batch",
        ),
        (between(nn.Softmax(-1)), {"0.weight": [2]}, (2, 4), "Softmax 1 mixes its channels"),
        (between(nn.GLU(), 3), {"0.weight": [2]}, (2, 4), "GLU 1 is not known to keep channels apart"),
        (
            nn.Sequential(nn.ConvTranspose1d(2, 4, 1), nn.Conv1d(4, 2, 1)),
            {"0.weight": (slice(None), [1])},
            (1, 2, 5),
            "channels of conv_transpose1d are not followed",
        ),
    ],
)
def test_refuses_with_a_reason(
    model: nn.Module, rows: dict[str, Any], x: tuple[int, ...], reason: str
) -> None:
    ctx = removed(with_zero_rows(model, rows), torch.randn(x).double())
    assert rewrites(ctx) == 0
    assert notes(ctx)
    assert all(f" since {reason}" in note for note in notes(ctx))
    assert error(ctx, model, torch.randn(x).double()) <= EXACT


def test_without_shapes_or_graph_it_says_so() -> None:
    model = mlp(nn.ReLU())
    ctx = PassContext(None, "infer", capture(model, modes=("eval",)), Report())
    run_passes(PASSES, ctx)
    assert notes(ctx) == ["no neuron is removed: shapes are unknown"]


class Phase(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.angle(x)


def complex_linear(*between: nn.Module, dtype: torch.dtype = torch.cdouble) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6, dtype=torch.cdouble), *between, nn.Linear(6, 3, dtype=dtype))


def complex_conv(padding: int) -> nn.Module:
    first = nn.Conv2d(5, 6, 3, padding=1, dtype=torch.cdouble)
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(6, 3, 3, padding=padding, dtype=torch.cdouble))


@pytest.mark.parametrize(
    ("model", "shape", "gone"),
    [
        (complex_linear(), (4, 5), 2),
        (complex_linear(nn.Tanh()), (4, 5), 2),
        (complex_linear(Phase(), dtype=torch.double), (4, 5), 2),
        (complex_conv(padding=0), (2, 5, 6, 6), 2),
        (complex_conv(padding=1), (2, 5, 6, 6), 1),
    ],
)
def test_constants_of_complex_layers(model: nn.Module, shape: tuple[int, ...], gone: int) -> None:
    x = torch.randn(shape, dtype=torch.cdouble)
    ctx = removed(with_zero_rows(model, {"0.weight": [1, 4]}), x)
    assert neurons(ctx) == {"0.weight": gone}
    assert error(ctx, model, x) <= EXACT


# -- the whole compilation -----------------------------------------------------------------------------------


def test_a_trained_sparse_module_shrinks_compiles_and_reports() -> None:
    model, x = nn.Sequential(nn.Linear(8, 40), nn.GELU(), nn.Linear(40, 4)), torch.randn(16, 8)
    sparse = fxsparse.compile(model, Plan(sparsity=0.9, method=static("random")), example_inputs=x)
    dense = sparse.to_dense().eval()
    dead = int((dense[0].weight == 0).all(1).sum())
    assert dead > 0
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=x)
    report = fast.report.to_dict()
    (row,) = [row for row in report["layers"] if row["name"] == "0.weight"]
    assert row["neurons_removed"] >= dead
    assert row["shape"] == [40 - row["neurons_removed"], 8]
    assert report["totals"]["numel"] == 12 * (40 - row["neurons_removed"])
    assert report["totals"]["neurons_removed"] == row["neurons_removed"]
    assert report["totals"]["bytes_dense"] == 4 * 480
    assert report["totals"]["flops_dense"] == 2 * 480  # of the model as it came
    assert "neurons removed" in str(fast.report)
    stored = sum(tensor.nbytes for tensor in fast.state_dict().values())
    assert stored < sum(tensor.nbytes for tensor in dense.state_dict().values()) / 2
    with torch.no_grad():
        want = dense(x)
        torch.testing.assert_close(fast(x), want)
        torch.testing.assert_close(torch.compile(fast, backend="eager", fullgraph=True)(x), want)


# -- every family of torchvision -----------------------------------------------------------------------------


def regnet(**options: Any) -> nn.Module:
    parameters = models.regnet.BlockParams.from_init_params(
        depth=4, w_0=16, w_a=16.0, w_m=2.0, group_width=8, **options
    )
    return models.RegNet(parameters, num_classes=7, stem_width=16)


def vgg(name: str) -> nn.Module:
    """The real features; a classifier of the same form that is not 100 million weights wide."""
    with torch.device("meta"):  # where what is replaced draws no weights
        model = models.get_model(name, num_classes=7)
    for layer in model.features.to_empty(device="cpu"):
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            layer.reset_parameters()
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0], model.classifier[3] = nn.Linear(2048, 256), nn.Linear(256, 128)
    model.classifier[6] = nn.Linear(128, 7)
    return model


def alexnet() -> nn.Module:
    model = models.AlexNet(num_classes=7)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[1], model.classifier[4] = nn.Linear(1024, 256), nn.Linear(256, 128)
    model.classifier[6] = nn.Linear(128, 7)
    return model


def convnext() -> nn.Module:
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(16, 32, 2), block(32, None, 1)], num_classes=7)


def resnet(block: Any, **options: Any) -> nn.Module:
    return models.ResNet(block, [2, 1, 1, 1], num_classes=7, **options)


BASIC, BOTTLENECK = models.resnet.BasicBlock, models.resnet.Bottleneck
SWIN = partial(models.SwinTransformer, [4, 4], 16, [2, 2], [1, 2], [4, 4])
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "alexnet": (alexnet, 64, ("classifier.1.weight", "classifier.4.weight", "features.3.weight")),
    "vgg": (partial(vgg, "vgg11"), 32, ("classifier.0.weight", "classifier.3.weight", "features.0.weight")),
    "vgg_bn": (partial(vgg, "vgg11_bn"), 32, ("classifier.0.weight", "classifier.3.weight")),
    "resnet": (partial(resnet, BASIC), 32, ("layer1.0.conv1.weight",)),
    "bottleneck": (partial(resnet, BOTTLENECK), 32, ("layer1.1.conv1.weight", "layer1.1.conv2.weight")),
    "resnext": (
        partial(resnet, BOTTLENECK, groups=64, width_per_group=1),
        32,
        ("layer1.0.conv1.weight", "layer1.0.conv2.weight"),
    ),
    "wide_resnet": (partial(resnet, BOTTLENECK, width_per_group=128), 32, ("layer1.1.conv2.weight",)),
    "densenet": (partial(models.DenseNet, 8, (2, 2, 2), 16, num_classes=7), 32, ("features.conv0.weight",)),
    "squeezenet": (partial(models.squeezenet1_1, num_classes=7), 64, ("features.3.expand1x1.weight",)),
    "googlenet": (partial(models.googlenet, init_weights=False), 32, ("inception3a.branch2.0.conv.weight",)),
    "inception": (
        partial(models.inception_v3, init_weights=False),
        75,
        ("Mixed_5b.branch5x5_1.conv.weight",),
    ),
    "mobilenet_v2": (partial(models.mobilenet_v2, width_mult=0.35), 32, ("features.2.conv.0.0.weight",)),
    "mobilenet_v3": (models.mobilenet_v3_small, 32, ("features.11.block.0.0.weight",)),
    "mnasnet": (partial(models.MNASNet, 0.35), 32, ("layers.8.0.layers.0.weight",)),
    "shufflenet": (models.shufflenet_v2_x0_5, 32, ("stage2.1.branch2.0.weight",)),
    "regnet": (partial(regnet, se_ratio=0.25), 32, ("trunk_output.block1.block1-0.f.se.fc1.weight",)),
    "efficientnet": (models.efficientnet_b0, 32, ("features.2.0.block.0.0.weight",)),
    "convnext": (convnext, 32, ("features.1.0.block.3.weight",)),
    "vit": (
        partial(models.VisionTransformer, 32, 8, 2, 2, 32, 64, num_classes=7),
        32,
        ("encoder.layers.encoder_layer_0.mlp.0.weight", "encoder.layers.encoder_layer_1.mlp.0.weight"),
    ),
    "swin": (partial(SWIN, num_classes=7), 32, ("features.1.0.mlp.0.weight",)),
    "maxvit": (
        partial(models.MaxVit, (64, 64), 16, 2, [16, 32], [1, 1], 8, 0.2, num_classes=7),
        64,
        ("blocks.0.layers.0.layers.MBconv.layers.conv_a.0.weight",),
    ),
}


def damaged(model: nn.Module) -> nn.Module:
    """Random weights, biases and norms, and 40 % of all rows zero."""
    with torch.no_grad():
        for name, parameter in lived(model).named_parameters():
            if "layer_scale" in name:
                nn.init.normal_(parameter, 0, 0.5)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                module.weight[torch.rand(len(module.weight)) < 0.4] = 0
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0, 0.3)
    return model.double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:The default weight init:FutureWarning")
def test_every_family_computes_what_it_did_with_fewer_neurons(family: str) -> None:
    build, size, expected = FAMILIES[family]
    model, x = damaged(build()), torch.randn(2, 3, size, size).double()
    ctx = removed(model, x)
    assert error(ctx, model, x) <= EXACT
    gone = neurons(ctx)
    assert [name for name in expected if not gone.get(name)] == []
    assert rewrites(ctx) == sum(gone.values())
    for name, shrunk in ctx.shrunk.items():
        assert fetch(ctx.program.skeleton, name).shape == ctx.weights[name].shape
        assert ctx.weights[name].numel < shrunk.numel == fetch(model, name).numel()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ELU(), nn.Conv1d(8, 2, 1)), (2, 3, 12)),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ELU(), nn.Conv2d(8, 2, 3)), (3, 9, 9)),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 2)), (6,)),
    ],
    ids=["one dimension", "no batch, image", "no batch, vector"],
)
def test_sizes_that_a_trace_fixed_count_as_numbers(
    model: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    net, x = with_zero_rows(model().double(), {"0.weight": [0, 3, 5]}), torch.randn(shape).double()
    ctx = removed(net, x)
    assert neurons(ctx) == {"0.weight": 3}
    assert error(ctx, net, x) < EXACT


class Keyworded(nn.Module):
    """Takes outputs apart, or reshapes them, with everything given by name."""

    def __init__(self, pieces: bool) -> None:
        super().__init__()
        self.pieces = pieces
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pieces:
            return self.b(torch.reshape(input=self.a(x), shape=(-1, 8)))
        first, second = torch.chunk(input=self.a(x), chunks=2, dim=-1)
        return self.b(torch.cat([first.relu(), second], -1))


@pytest.mark.parametrize("pieces", [True, False])
def test_calls_by_keyword_are_rewritten_too(pieces: bool) -> None:
    net, x = with_zero_rows(Keyworded(pieces).double(), {"a.weight": [0, 3, 5]}), torch.randn(3, 6).double()
    ctx = removed(net, x)
    assert neurons(ctx) == {"a.weight": 3}
    assert error(ctx, net, x) < EXACT


class Reshaped(nn.Module):
    """Reads a part of a size, which is a tuple of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.permute(0, 3, 1, 2).shape[2:]
        return self.last(self.first(x).relu()).reshape(-1, sizes[0] * sizes[1], 4)


def test_parts_of_a_size_are_no_pieces_of_a_tensor() -> None:
    model = with_zero_rows(Reshaped(), {"first.weight": [1, 4]})
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    ctx = removed(model, x)
    assert neurons(ctx) == {"first.weight": 2}
    assert error(ctx, model, x) < EXACT
