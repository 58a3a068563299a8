"""Shapes of every value, with batch and sequence as symbols."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxsparse
from fxsparse import Plan, count_flops
from fxsparse.errors import TraceError
from fxsparse.flops.sites import OUT_OF_SIGHT
from fxsparse.graph import sites
from fxsparse.methods import static
from fxsparse.passes import Functionalize, InferShapes
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


def shaped(model: nn.Module, inputs: Any) -> PassContext:
    ctx = PassContext(None, "train", capture(model, inputs), Report(), inputs)
    run_passes([Functionalize(), InferShapes()], ctx)
    return ctx


def outputs(ctx: PassContext) -> list[list[str]]:
    """Shapes of what the sites compute, with symbols by name."""
    gm = ctx.program.graphs["eval"]
    names = {str(symbol): name for name, symbol in gm.meta["symbols"].items()}
    shapes = [site.node.meta["val"].shape for site in sites(gm)]
    return [[names.get(str(size), str(size)) for size in shape] for shape in shapes]


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_and_sequence_are_symbols(batch: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    assert outputs(shaped(model, torch.randn(batch, 5, 4))) == [
        ["batch", "sequence", "6"],
        ["batch", "sequence", "2"],
    ]


class Padded(nn.Module):
    """Exported; its padding is an op whose C++ body would fix the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 9:
            x = torch.nn.functional.pad(x, (0, 9 - x.shape[-1]))
        return self.conv(x)


def test_exported_graphs_keep_a_symbolic_batch() -> None:
    ctx = shaped(Padded(), torch.randn(2, 3, 8, 8))
    assert ctx.program.tier == "export"
    assert outputs(ctx) == [["batch", "4", "6", "7"]]


def test_what_the_model_fixes_is_noted() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 5, 4))
            self.lin = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x + self.position)

    ctx = shaped(Fixed(), torch.randn(3, 5, 4))
    assert outputs(ctx) == [["batch", "5", "2"]]
    assert ctx.report.passes[-1]["notes"] == ["the sequence is fixed at 5 by the model"]


def test_the_walk_has_shapes_of_its_sites() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.never = nn.Linear(4, 6), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) if type(x).__name__ != "Proxy" and not torch.compiler.is_exporting() else x

    ctx = shaped(Stubborn(), torch.randn(3, 4))
    assert ctx.program.tier == "walk", ctx.program.notes
    called, never = (site.node for site in sites(ctx.program.graphs["eval"]))
    assert str(called.meta["val"].shape[1]) == "6"
    assert "val" not in never.meta


def test_nothing_of_the_model_changes() -> None:
    model = torchvision.models.resnet18()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shaped(model, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Chosen(nn.Module):
    """Two layers, the first on the rows alone whose first entry is above 0."""

    def __init__(self, tier: str) -> None:
        super().__init__()
        self.few, self.all = nn.Linear(4, 6), nn.Linear(4, 2)
        self.tier = tier

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.tier == "export" and x.shape[0] > 1000:
            return self.few(x), self.all(x)
        if self.tier == "walk" and (type(x).__name__ == "Proxy" or torch.compiler.is_exporting()):
            return self.all(x), self.all(x)
        return self.few(x[x[:, 0] > 0]), self.all(x)


ROWS = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])[:, None].expand(5, 4)


@pytest.mark.parametrize("tier", ["symbolic", "export", "walk"])
@pytest.mark.parametrize("batch", [5, 1])
def test_sizes_that_depend_on_values_are_those_of_the_example(tier: str, batch: int, tmp_path: Path) -> None:
    model, x = Chosen(tier).eval(), ROWS[:batch].clone()
    few = 3 if batch == 5 else 1
    ctx = shaped(model, x)
    assert ctx.program.tier == tier, ctx.program.notes
    assert any("those of the sizes in the example inputs: sizes depend on the values" in n for n in ctx.notes)
    count = count_flops(model, x)
    flops = {layer.weight: layer.dense for layer in count.layers}
    assert flops == {"few.weight": 2 * 4 * 6 * few // batch, "all.weight": 2 * 4 * 2}
    assert count.uncounted == ((OUT_OF_SIGHT,) if tier == "walk" else ())
    trained = fxsparse.compile(model, Plan(sparsity=0.5, method=static()), example_inputs=x).eval()
    fast = fxsparse.compile(trained, mode="infer", example_inputs=x)
    for compiled in (trained, fast):
        torch.testing.assert_close(compiled(ROWS), trained.to_dense()(ROWS))
        fxsparse.save(compiled, tmp_path / "file")
        torch.testing.assert_close(
            fxsparse.load(tmp_path / "file", Chosen(tier).eval())(ROWS), compiled(ROWS)
        )


def test_on_meta_there_are_no_values_that_sizes_could_depend_on() -> None:
    with torch.device("meta"):
        model = Chosen("symbolic")
    with pytest.raises(TraceError, match="tensors on meta have no values to decide by"):
        count_flops(model, torch.empty(5, 4, device="meta"))


class Attending(nn.Module):
    """Attention among the rows that were chosen, after a norm that asks how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.lin(x[x[:, 0] > 0]))[None]
        return nn.functional.scaled_dot_product_attention(rows, rows, rows)


@pytest.mark.parametrize("training", [True, False])
def test_products_of_sizes_that_depend_on_values_count_as_in_the_example(training: bool) -> None:
    count = count_flops(Attending().train(training), ROWS.clone())
    assert count.dense == 2 * 4 * 4 * 3 // 5 + 2 * 2 * 3 * 3 * 4 // 5
    assert not count.uncounted


def test_sizes_by_data_count_where_the_model_fixes_the_batch() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 6)
            self.register_buffer("mask", ROWS[:, 0] > 0)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x[self.mask])

    count = count_flops(Masked(), ROWS.clone())
    assert count.dense == 2 * 4 * 6 * 3 // 5
    assert not count.uncounted


def test_a_walk_whose_sizes_are_numbers_of_python_is_counted_as_it_ran() -> None:
    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x[: int((x[:, 0] > 0).sum())])

    assert count_flops(Top(), ROWS.clone()).dense == 2 * 4 * 6 * 3 // 5


def test_a_module_of_several_outputs_counts_by_its_first() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 1), nn.MaxPool2d(2, return_indices=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.conv(x))[0]

    layers = count_flops(Pooled(), torch.randn(2, 3, 4, 4)).layers
    assert {layer.weight: layer.dense for layer in layers}["conv.weight"] == 2 * 3 * 4 * 16


def test_a_graph_that_fails_on_the_example_leaves_sizes_by_data_unknown() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.norm(self.lin(x))[x[:, 0] > 0]
            return self.last(nn.functional.dropout(rows, 0.5, self.training))

    ctx = shaped(Normed(), ROWS[:1].clone())  # a norm takes no single row in training
    assert any(
        "they stay unknown, as the graph fails on example_inputs: Expected more" in n for n in ctx.notes
    )
