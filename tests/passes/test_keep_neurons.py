import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.errors import PlanError
from fxsparse.methods import chase, rigl, srigl
from fxsparse.pattern import ConstantFanIn


def neurons(model, plan=None, example_inputs=None):
    """{weight: what the report says of its neurons}"""
    plan = Plan(sparsity=0.5, method=srigl()) if plan is None else plan
    rows = fxsparse.plan_report(model, plan, example_inputs).to_dict()["layers"]
    return {row["name"]: row.get("neurons") for row in rows}


def all_stay(model, **options):
    """{weight: why} of those that keep all neurons."""
    told = neurons(model, **options).items()
    return {name: text.removeprefix("all stay: ") for name, text in told if text != "may be ablated"}


def mlp(outputs=10):
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, outputs))


def test_the_last_layer_keeps_its_neurons_without_being_asked():
    assert all_stay(mlp()) == {"4.weight": "outputs of the model"}


def test_what_follows_the_last_product_does_not_matter():
    assert list(all_stay(nn.Sequential(mlp(), nn.Softmax(-1), nn.Unflatten(1, (5, 2))))) == ["0.4.weight"]


class Heads(nn.Module):
    """Two outputs, a residual stream, and a batch size read off a hidden value."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.outer = nn.Linear(16, 24), nn.Linear(24, 48), nn.Linear(48, 24)
        self.one, self.two = nn.Linear(24, 10), nn.Linear(24, 6)

    def forward(self, x):
        x = self.embed(x)
        size = self.inner(x).shape[0]
        x = x + self.outer(F.relu(self.inner(x)))
        return {"one": self.one(x).view(size, 5, 2), "two": torch.sigmoid(self.two(x))}


def test_every_head_counts_and_reading_a_shape_does_not():
    assert list(all_stay(Heads())) == ["one.weight", "two.weight"]


def test_what_writes_to_a_stream_that_comes_out_is_an_output():
    headless = Heads()
    headless.one = headless.two = nn.Identity()
    assert list(all_stay(headless)) == ["embed.weight", "outer.weight"]


@pytest.mark.parametrize(
    ("build", "kept"),
    [
        (torchvision.models.resnet18, ["fc.weight"]),
        (torchvision.models.vit_b_16, ["heads.head.weight"]),
        (torchvision.models.mobilenet_v3_small, ["classifier.3.weight"]),
    ],
)
def test_real_models_keep_their_classifier(build, kept):
    with torch.device("meta"):
        model = build()
    assert list(all_stay(model)) == kept


def test_globs_name_weights_in_full():
    plan = Plan(sparsity=0.5, method=srigl(never_ablate=["*.0.weight", "2"]))
    told = all_stay(
        nn.ModuleDict({"a": mlp()})["a"], plan=Plan(sparsity=0.5, method=srigl(never_ablate=["2"]))
    )
    assert told == {"2.weight": "named by never_ablate='2'", "4.weight": "outputs of the model"}
    assert list(
        all_stay(nn.Sequential(mlp(), mlp()), plan=Plan(sparsity=0.5, method=srigl(never_ablate=["0.2"])))
    ) == [
        "0.2.weight",
        "1.4.weight",
    ]
    with pytest.raises(PlanError, match=r"never_ablate='\*.0.weight': expected a glob of selected weights"):
        neurons(mlp(), plan)


def test_a_given_fan_in_keeps_neurons_and_fan_in():
    plan = Plan(sparsity=0.5, method=srigl(), overrides=(Override("0", pattern=ConstantFanIn(3)),))
    assert all_stay(mlp(), plan=plan)["0.weight"] == "the plan gives its fan-in, 3"
    assert fxsparse.allocate(mlp(), plan)["0.weight"] == 72


def test_the_walk_takes_the_last_weight_for_the_output():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp()

        def forward(self, x):
            return self.layers(x) if float(x.sum()) > 0 else self.layers(-x)

    assert all_stay(Untraceable()) == {"layers.4.weight": "outputs of the model"}


def test_methods_that_ablate_nothing_say_nothing_of_neurons():
    for method in (srigl(ablate=False), rigl()):
        assert set(neurons(mlp(), Plan(sparsity=0.5, method=method)).values()) == {None}
    assert "may be ablated" not in str(fxsparse.plan_report(mlp(), Plan(sparsity=0.5)))
    assert "may be ablated" in str(fxsparse.plan_report(mlp(), Plan(sparsity=0.5, method=srigl())))


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.back = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.back(self.inner(x).relu()))


def channels(method, example_inputs):
    plan = Plan(sparsity=0.5, method=method, storage="masked")
    sparse = fxsparse.compile(Added(), plan, example_inputs=example_inputs)
    return {name: target.channels for name, target in sparse._emitted.targets.items()}


def test_rows_that_are_added_have_one_number_for_a_rule_over_all_weights():
    found = channels(chase(), torch.randn(2, 6))
    assert found["stem.weight"] == found["back.weight"]
    assert len({*found["stem.weight"], *found["inner.weight"], *found["head.weight"]}) == 8 + 5 + 3
    assert set(channels(chase(), None).values()) == {()}
    assert set(channels(srigl(), torch.randn(2, 6)).values()) == {()}
