import sys

import pytest
import torch
from torch import nn

from fxsparse import arguments
from fxsparse.arguments import UsageError
from fxsparse.budget import Budget
from fxsparse.cli import parser
from fxsparse.errors import PlanError
from fxsparse.methods import gse, rigl, static
from fxsparse.pattern import NM, Block, ConstantFanIn, Strided, Unstructured
from fxsparse.plans import Plan
from fxsparse.transforms import SparseParallel, SparseWide


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module in the current folder, as a user has it."""
    source = (
        "from torch import nn\nwidth = 3\ndef build(): return nn.Linear(width, 2)\ndef sized(n): return n\n"
    )
    (tmp_path / "mine.py").write_text(source + "def nothing(): return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "mine"
    sys.modules.pop("mine", None)


def test_model_comes_from_a_factory_in_the_current_folder(user_module):
    model = arguments.model(f"{user_module}:build")
    assert isinstance(model, nn.Linear)
    assert model.in_features == 3


def test_model_comes_untrained_from_torchvision():
    assert type(arguments.model("torchvision:squeezenet1_1")).__name__ == "SqueezeNet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet50", "model 'resnet50': expected module:factory, such as torchvision:resnet50."),
        ("absent_module:f", "'absent_module' does not import here: No module named 'absent_module'."),
        ("mine:absent", "'mine' has no function 'absent'."),
        ("mine:width", "'mine' has no function 'width'."),
        ("mine:sized", "it is called without arguments, and has a missing a required argument: 'n'."),
        ("mine:nothing", "expected an nn.Module, the factory gave NoneType."),
        ("torchvision:resnet5", "torchvision has no model of that name."),
    ],
)
def test_model_that_does_not_exist(user_module, text, message):
    with pytest.raises(UsageError) as error:
        arguments.model(text)
    assert message in str(error.value)


def test_without_torchvision_its_models_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match="torchvision does not import here"):
        arguments.model("torchvision:resnet50")


def test_example_inputs_have_the_shape_and_dtype_that_was_written():
    floats, integers = arguments.examples(["2x3:bfloat16", "4:int64"]) or ()
    assert (floats.shape, floats.dtype) == ((2, 3), torch.bfloat16)
    assert torch.equal(integers, torch.zeros(4, dtype=torch.int64))


def test_no_example_inputs_is_none():
    assert arguments.examples([]) is None


@pytest.mark.parametrize("text", ["", "axb", "1x", "1,2", "2x2:float33", "2x2:nn"])
def test_example_that_is_not_one(text):
    with pytest.raises(UsageError, match=f"input '{text}'"):
        arguments.example(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unstructured", Unstructured()),
        ("constant-fan-in", ConstantFanIn()),
        ("2:4", NM(2, 4)),
        ("strided-1:4", Strided(4)),
        ("16x8", Block(16, 8)),
    ],
)
def test_pattern_by_its_word(text, expected):
    assert arguments.pattern(text) == expected


def test_unknown_pattern_lists_the_known_ones():
    with pytest.raises(UsageError, match="pattern 'dense': expected unstructured, constant-fan-in, n:m"):
        arguments.pattern("dense")


def plan_of(*words):
    return arguments.plan(parser().parse_args(["plan", "torchvision:alexnet", *words]))


def test_plan_from_options():
    assert plan_of("--sparsity", "0.8") == Plan(sparsity=0.8)
    words = (
        "--sparsity",
        "0.8",
        "--method",
        "static",
        "--allocation",
        "uniform",
        "--exclude",
        "a",
        "--exclude",
        "b",
    )
    expected = Plan(sparsity=0.8, method=static(), allocation="uniform", exclude=("a", "b"))
    assert plan_of(*words) == expected


def test_options_take_the_place_of_what_the_plan_file_says(tmp_path):
    path = tmp_path / "plan.toml"
    Plan(sparsity=0.5, allocation="er", method=rigl(every=7)).save(path)
    assert plan_of("--plan", str(path), "--sparsity", "0.9") == Plan(
        sparsity=0.9, allocation="er", method=rigl(every=7)
    )


def test_plan_from_a_preset():
    assert plan_of("--plan", "rigl-90") == Plan.preset("rigl-90")


def test_a_transformation_has_its_options_as_in_a_plan_file():
    inputs = ("--sparsity", "0.5", "--input", "1x3x64x64", "--transform")
    assert plan_of(*inputs, "sparse-wide").transform == SparseWide()
    words = 'sparse-parallel(adjust=true, sigma="norm", keep=["*.shortcut.*"])'
    expected = SparseParallel(adjust=True, sigma="norm", keep=("*.shortcut.*",))
    assert plan_of(*inputs, words).transform == expected
    with pytest.raises(
        UsageError, match=r"transform 'sparse-parallel\(sigma=norm\)': expected a name, or a name with"
    ):
        plan_of(*inputs, "sparse-parallel(sigma=norm)")
    with pytest.raises(PlanError, match="has no field 'adust'; its fields: sigma, adjust"):
        plan_of(*inputs, "sparse-parallel(adust=true)")


def test_what_is_missing_is_named_by_its_option(tmp_path):
    with pytest.raises(
        UsageError,
        match=r"expected --sparsity 0.9, --budget flops=0.3, an n:m --pattern such as 2:4, or --plan",
    ):
        plan_of("--method", "rigl")
    assert plan_of("--pattern", "2:4").sparsity == 0.5
    path = tmp_path / "plan.toml"
    Plan(sparsity=0.5, transform=SparseWide()).save(path)
    for words in (("--sparsity", "0.5", "--transform", "sparse-wide"), ("--plan", str(path))):
        with pytest.raises(UsageError, match=r"transform 'sparse-wide': .* name them with --input"):
            plan_of(*words)


@pytest.mark.parametrize("words", [("--sparsity", "1.5"), ("--sparsity", "0.9", "--method", "absent")])
def test_plan_that_cannot_be(words):
    with pytest.raises(PlanError):
        plan_of(*words)


def test_a_budget_takes_the_place_of_a_sparsity(tmp_path):
    assert plan_of("--budget", "flops=0.3") == Plan(budget=Budget(flops=0.3))
    assert plan_of("--plan", "gse-90", "--budget", "bytes=.5") == Plan(budget=Budget(bytes=0.5), method=gse())
    Plan(budget=Budget(total=0.5)).save(tmp_path / "plan.toml")
    assert plan_of("--plan", str(tmp_path / "plan.toml"), "--sparsity", "0.8") == Plan(sparsity=0.8)


@pytest.mark.parametrize("text", ["0.3", "flops", "flops=", "flops=many", "time=0.5", "cost=1"])
def test_a_budget_that_is_none(text):
    with pytest.raises(UsageError, match=r"expected one of parameters, .* such as flops=0.3"):
        plan_of("--budget", text)


def test_a_budget_is_checked_as_that_of_a_plan():
    with pytest.raises(PlanError, match=r"expected a share of dense in \(0, 1\]"):
        plan_of("--budget", "flops=3")
    with pytest.raises(PlanError, match="either a sparsity or a budget"):
        plan_of("--budget", "flops=0.3", "--sparsity", "0.9")
