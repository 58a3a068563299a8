"""What the zeros of a weight are called."""

import pytest
import torch
from torch import Tensor, nn

from fxsparse.passes import (
    CollectWeights,
    DetectPattern,
    FoldBatchNorm,
    FoldMasks,
    Functionalize,
    InferShapes,
    RemoveIdentities,
)
from fxsparse.passes.detect_pattern import detect
from fxsparse.pattern import NM, Block, ConstantFanIn, Pattern, Strided, Unstructured
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


@pytest.mark.parametrize("shape", [(64, 64), (32, 32, 3, 3)])
@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(),
        ConstantFanIn(5),
        NM(1, 4),
        NM(2, 8),
        Block(4, 4),
        Block(1, 8),
        Block(8, 1),
        Strided(4),
        Strided(32),
    ],
)
def test_names_the_pattern_a_mask_was_made_with(pattern: Pattern, shape: tuple[int, ...]) -> None:
    mask = pattern.project(torch.rand(shape), torch.Size(shape).numel() // 8)
    assert detect(mask) == pattern


def test_2_of_4_is_named_by_its_smallest_group() -> None:
    assert detect(NM(2, 4).project(torch.rand(16, 32), 0)) == NM(2, 4)


def test_empty_rows_do_not_hide_a_constant_fan_in() -> None:
    mask = ConstantFanIn(3).project(torch.rand(10, 20), 0)
    mask[[2, 7]] = False
    assert detect(mask) == ConstantFanIn(3)


def test_a_single_entry_of_a_row_says_nothing_of_strides() -> None:
    assert detect(Strided(8).project(torch.rand(20, 8), 0)) == ConstantFanIn(1)


@pytest.mark.parametrize("mask", [torch.ones(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)])
def test_all_or_nothing_is_no_pattern(mask: Tensor) -> None:
    assert detect(mask) == Unstructured()


def test_one_more_entry_breaks_a_pattern() -> None:
    mask = NM(1, 4).project(torch.rand(16, 16), 0)
    mask[3, int((~mask[3]).nonzero()[0])] = True
    assert detect(mask) == Unstructured()


def detected(model: nn.Module) -> PassContext:
    ctx = PassContext(None, "infer", capture(model, modes=("eval",)), Report())
    passes = (
        FoldMasks(),
        Functionalize(),
        CollectWeights(),
        RemoveIdentities(),
        InferShapes(),
        FoldBatchNorm(),
        DetectPattern(),
    )
    run_passes(passes, ctx)
    return ctx


def test_decisions_hold_exact_counts_and_notes_tell_empty_rows() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(1.0)[1] = 0
    ctx = detected(model)
    assert {name: d.nnz for name, d in ctx.decisions.items()} == {"0.weight": 24, "1.weight": 16}
    assert ctx.decisions["0.weight"].sparsity_target == 0.25
    assert ctx.report.passes[-1]["notes"] == ["0.weight: 1 of 4 rows are empty"]
    assert ctx.report.passes[-1]["rewrites"] == 0


def test_a_transposed_weight_is_read_by_its_output_rows() -> None:
    class Product(nn.Module):
        weight: nn.Parameter

        def __init__(self) -> None:
            super().__init__()
            weight = torch.zeros(6, 4)
            weight[:2] = 1.0
            weight[2, 0] = 1.0  # output 0 reads three inputs, the others two
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    decision = detected(Product()).decisions["weight"]
    assert (decision.nnz, decision.pattern) == (9, Unstructured())
