from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from fxsparse.errors import PatternError, PlanError
from fxsparse.method import Method
from fxsparse.passes import AllocateNnz
from fxsparse.pattern import NM, Block, ConstantFanIn, Unstructured
from fxsparse.pipeline import PassContext, Program, WeightSpec
from fxsparse.plans import Override, Plan
from fxsparse.report import Report


def spec(name, shape, **facts):
    return WeightSpec(name, "linear", shape, torch.float32, **facts)


FC1, FC2 = spec("0.weight", (20, 10)), spec("1.weight", (4, 20))


def decided(plan, *specs, excluded=()):
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 4))
    graph = symbolic_trace(model)
    ctx = PassContext(plan, "train", Program("symbolic", model, {"train": graph}), Report())
    ctx.weights = {s.name: s for s in specs or (FC1, FC2)}
    ctx.excluded = {s.name: s for s in excluded}
    assert AllocateNnz().run(graph, ctx) == 0
    return ctx


def plan(sparsity=0.9, **wishes):
    nothing: Any = None
    method = Method("static", reparam=nothing, init=nothing, source="a test")
    return Plan(
        **(
            {"sparsity": sparsity, "allocation": "uniform", "pattern": Unstructured(), "method": method}
            | wishes
        )
    )


def counts(ctx):
    return {name: decision.nnz for name, decision in ctx.decisions.items()}


def test_every_weight_gets_pattern_target_and_count():
    decision = decided(plan()).decisions["0.weight"]
    assert (decision.pattern, decision.nnz) == (Unstructured(), 20)
    assert decision.sparsity_target == pytest.approx(0.9)


def test_counts_are_what_the_pattern_can_hold():
    # 0.75 of zeros leaves 50 of 200 (2 a row of 20) and 20 of 80 (5 a row of 4).
    ctx = decided(plan(0.75, pattern=ConstantFanIn()))
    assert counts(ctx) == {"0.weight": 40, "1.weight": 20}


def test_a_transposed_weight_has_its_rows_in_the_second_dimension():
    ctx = decided(plan(0.75, pattern=ConstantFanIn()), spec("0.weight", (10, 20), transposed=True))
    assert counts(ctx) == {"0.weight": 40}


def test_a_pattern_with_one_count_is_not_the_allocations_to_decide():
    ctx = decided(plan(0.5, pattern=NM(2, 4), allocation="erk"), spec("a", (2, 400)), spec("b", (64, 64)))
    assert counts(ctx) == {"a": 400, "b": 2048}


def test_overrides_force_sparsity_and_pattern_and_the_first_decides():
    wishes = (Override("0", sparsity=0.5), Override("*", pattern=NM(1, 4)))
    ctx = decided(plan(overrides=wishes))
    assert counts(ctx) == {"0.weight": 100, "1.weight": 20}
    assert ctx.decisions["1.weight"].pattern == NM(1, 4)


def test_a_weight_forced_dense_is_dense_under_any_pattern():
    ctx = decided(plan(0.5, pattern=NM(2, 4), overrides=(Override("0", sparsity=0),)))
    assert counts(ctx) == {"0.weight": 200, "1.weight": 40}


def test_dense_counts_are_kept_by_making_the_others_sparser():
    # Half of 200 + 80 + 60 is 170; 80 forced and 60 excluded leave 30.
    wishes = plan(0.5, overrides=(Override("1", sparsity=0),), keep_dense_counts=True)
    assert counts(decided(wishes, FC1, FC2, excluded=[spec("head.weight", (6, 10))])) == {
        "0.weight": 30,
        "1.weight": 80,
    }


def test_global_magnitude_reads_the_weights():
    ctx = decided(plan(0.5, allocation="global_magnitude"))
    assert sum(counts(ctx).values()) == 140


def test_the_second_graph_changes_nothing():
    ctx = decided(plan())
    before = dict(ctx.decisions)
    ctx.plan = plan(0.1)
    AllocateNnz().run(ctx.program.graphs["train"], ctx)
    assert ctx.decisions == before


def test_an_unmatched_override_is_refused():
    with pytest.raises(PlanError, match=r"Override\('fc1'\): .* names none of 0.weight, 1.weight"):
        decided(plan(overrides=(Override("fc1", sparsity=0.5),)))


def test_a_weight_that_would_keep_nothing_names_its_smallest_density():
    # A tenth of 200 over 20 rows is a fan-in of 1; of 80 over 4 rows it is 2; one in 200 is no fan-in at all.
    with pytest.raises(PlanError, match=r"'0.weight' .* cannot hold 10 .*smallest feasible density is 0.1\."):
        decided(plan(0.95, pattern=ConstantFanIn()))


def test_all_shapes_that_do_not_fit_are_named_at_once():
    other = spec("2.weight", (16, 16))
    with pytest.raises(
        PatternError, match=r"2 weights .*: 0.weight \[20, 10\], 1.weight \[4, 20\]. Of the first: "
    ):
        decided(plan(pattern=Block(8, 8)), FC1, FC2, other)
    wishes = tuple(Override(name, pattern=Unstructured()) for name in ("0", "1"))
    assert (
        decided(plan(0.5, pattern=Block(8, 8), overrides=wishes), FC1, FC2, other).decisions["2.weight"].nnz
        == 128
    )


def test_a_shape_that_does_not_fit_names_the_weight():
    with pytest.raises(PatternError, match=r"weight '0.weight': "):
        decided(plan(0.5, pattern=NM(2, 4)), spec("0.weight", (20, 10)))


def test_the_budget_is_what_the_pattern_rounded_down():
    decision = decided(plan(0.75, pattern=ConstantFanIn()), spec("a", (20, 10))).decisions["a"]
    assert (decision.budget, decision.nnz) == (50, 40)


def test_a_given_fan_in_is_its_own_budget():
    decision = decided(plan(0.75, pattern=ConstantFanIn(3)), spec("a", (20, 10))).decisions["a"]
    assert (decision.budget, decision.nnz) == (60, 60)


@pytest.mark.parametrize(
    ("wishes", "note"),
    [
        (
            # A scale of 140 / 54 gives "1.weight" 24 x 140 / 54 = 62, and "0.weight" 77: nothing is clipped.
            {"sparsity": 0.5, "allocation": "er_unrolled"},
            None,
        ),
        (
            # A scale of 266 / 54 would give "1.weight" 118.2 of its 80.
            {"sparsity": 0.05, "allocation": "er_unrolled"},
            "sparsity 0.1893 in place of 0.0500: of 266 entries er_unrolled gives out 227, as what one weight cannot "
            "hold goes to no other",
        ),
        ({"sparsity": 0.0, "allocation": "er_unrolled"}, None),
        ({"sparsity": 0.05, "allocation": "erk"}, None),
        (
            {"sparsity": 0.75, "allocation": "uniform", "pattern": ConstantFanIn()},
            "sparsity 0.7857 in place of 0.7500: of 70 entries the patterns hold 60",
        ),
        ({"sparsity": 0.75, "allocation": {"*": 0.75}}, None),
        (
            {"sparsity": 0.75, "allocation": {"*": 0.9}},
            "sparsity 0.9000 in place of 0.7500: the table of Plan.allocation decides, and Plan.sparsity is that of "
            "weights which it does not name",
        ),
        (
            {"sparsity": 0.9, "allocation": {"0": 0.5}},
            "sparsity 0.6143 in place of 0.9000: the table of Plan.allocation decides, and Plan.sparsity is that of "
            "weights which it does not name",
        ),
        ({"sparsity": 0.5, "pattern": NM(2, 4)}, None),
    ],
)
def test_another_sparsity_than_was_asked_for_is_noted(wishes, note):
    first = spec("0.weight", (20, 8)) if "NM" in str(wishes.get("pattern")) else FC1
    assert decided(plan(**wishes), first, FC2).notes == ([] if note is None else [note])
