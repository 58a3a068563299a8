"""The four values: fields, refusals with numbers, serialisation; and the closed forms of their sizes."""

from fractions import Fraction

import pytest

from fxsparse import Budget, Plan
from fxsparse.errors import PlanError
from fxsparse.methods import gse, rigl
from fxsparse.transforms import TRANSFORMS, SparseDoped, SparseFactorized, SparseParallel, SparseWide
from fxsparse.transforms.iso_flop import (
    branches,
    density,
    doped_rank,
    exact_sparsity,
    factorized_rank,
    widened,
    widening_sparsity,
)

CHANGED = (
    SparseWide(heads="grow", match="model"),
    SparseParallel(sigma="norm", adjust=True, keep=("*.shortcut.*",)),
    SparseFactorized(sigma="none", match="nominal"),
    SparseDoped(low_rank="sparse", sigma="relu"),
)


@pytest.mark.parametrize("transform", [*(kind() for kind in TRANSFORMS.values()), *CHANGED])
def test_a_plan_keeps_its_transform_as_a_dict_and_as_a_file(transform, tmp_path):
    plan = Plan(transform=transform, method=rigl(every=7), sparsity=0.75)
    assert Plan.from_dict(plan.to_dict()) == plan
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan


def test_fields_at_their_default_are_not_written():
    assert Plan(transform=SparseWide(), sparsity=0.5).to_dict()["transform"] == {"name": "sparse-wide"}
    assert "transform" not in Plan(sparsity=0.5).to_dict()


def test_nonzeros_are_shared_uniformly_unless_the_plan_says_otherwise():
    assert Plan(transform=SparseWide(), sparsity=0.5, method=gse()).allocation == "uniform"
    assert Plan(transform=SparseWide(), sparsity=0.5, allocation="erk").allocation == "erk"
    assert Plan(sparsity=0.5).allocation == "erk"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "sparse-tall"}, "expected a name among sparse-wide, .*, got 'sparse-tall'"),
        (
            {"name": "sparse-wide", "sigma": "relu"},
            "'sparse-wide' has no field 'sigma'; its fields: heads, match",
        ),
        (
            {"name": "sparse-doped", "low_rank": "both"},
            r"SparseDoped.low_rank: expected one of dense, sparse, got",
        ),
        (
            {"name": "sparse-parallel", "sigma": "tanh"},
            r"SparseParallel.sigma: expected one of none, norm, relu",
        ),
        ({"name": "sparse-factorized", "keep": "fc"}, r"SparseFactorized.keep: expected a tuple of globs"),
    ],
)
def test_bad_fields_are_refused_by_name(row, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_dict({"sparsity": 0.5, "transform": row})


def test_a_budget_says_nothing_of_how_wide_a_model_becomes():
    with pytest.raises(PlanError, match="a transform sizes the model by its sparsity"):
        Plan(transform=SparseWide(), budget=Budget(flops=0.5))


@pytest.mark.parametrize("wrong", ["sparse-wide", SparseWide])
def test_a_plan_takes_an_instance(wrong):
    with pytest.raises(
        PlanError, match=r"expected an instance, one of SparseWide\(\), SparseParallel\(\), .* got "
    ):
        Plan(transform=wrong, sparsity=0.5)


def test_adjust_is_true_or_false():
    with pytest.raises(PlanError, match=r"SparseParallel\.adjust: expected True or False, got 'no'"):
        SparseParallel(adjust="no")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("width", [1, 7, 32, 64, 768, 4096])
def test_the_smallest_sparsity_that_widens(width):
    least = widening_sparsity(width)
    assert widened(width, least) > width
    assert widened(width, round(least - 1e-4, 4)) == width


# -- closed forms ------------------------------------------------------------------------------------------


def test_widths_of_the_reference():
    assert [widened(64, s) for s in (0.5, 0.75, 0.9)] == [90, 128, 202]
    assert [widened(768, s) for s in (0.5, 0.75)] == [1086, 1536]
    assert widened(10**9, 0.99) == 10**10  # floor(k * width) of the decimal, with no rounding before


def test_branches_are_counted_on_the_decimal():
    assert [branches(s) for s in (0.0, 0.5, 0.75, 0.9, 0.99)] == [1, 2, 4, 10, 100]


def test_a_sparsity_without_a_whole_number_of_branches_is_refused_with_the_nearest_ones():
    with pytest.raises(PlanError) as refusal:
        SparseParallel().branches(0.6)
    said = str(refusal.value)
    assert "k would be 2.5: 2 branches have 0.8 of the dense FLOPs, 3 have 1.2" in said
    assert "0.5 (k=2) and 0.666667 (k=3); adjust=True" in said
    assert [SparseParallel(adjust=True).branches(s) for s in (0.55, 0.6, 0.9)] == [2, 3, 10]


def test_ranks_of_the_reference():
    # CIFAR ResNet-18's first stage, 3 x 3 on 64 channels.
    assert [factorized_rank(576, 64, s) for s in (0.5, 0.75)] == [116, 231]
    # 576 * 64 / 640 / (1 / 10) is 576; the reference, in floating point, has 577.
    assert factorized_rank(576, 64, 0.9) == 576
    assert [doped_rank(576, 64, s) for s in (0.5, 0.75, 0.9)] == [28, 43, 51]
    assert doped_rank(576, 64, 0.0) == 0


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75, 0.9, 0.99])
def test_ranks_cost_what_they_should_up_to_one_of_them(sparsity):
    inputs, outputs = 96 * 9, 160
    rank = factorized_rank(inputs, outputs, sparsity)
    excess = rank * (inputs + outputs) * density(sparsity) - inputs * outputs
    assert 0 <= excess < (inputs + outputs) * density(sparsity)
    rank = doped_rank(inputs, outputs, sparsity)
    lack = inputs * outputs * (1 - density(sparsity)) - rank * (inputs + outputs)
    assert 0 <= lack < inputs + outputs


def test_the_exact_sparsity_is_the_rational_number():
    assert exact_sparsity(100, 20, 400) == float(1 - Fraction(80, 400))
    with pytest.raises(
        PlanError, match=r"expected 120 FLOPs that stay and up to 400 .* to meet 100; what stays is too much"
    ):
        exact_sparsity(100, 120, 400)
    with pytest.raises(PlanError, match="they are too few"):
        exact_sparsity(500, 0, 400)
