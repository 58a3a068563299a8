"""The printed artefact has the sizes that its weights have."""

from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

import fxsparse
from fxsparse import choosing, inference, kernel
from fxsparse.choosing import Choice
from fxsparse.inference import Speed


@pytest.fixture(autouse=True)
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(problem, x, weight, *rest, **options) -> Choice:
        name = "cpu-csr" if problem.op == "linear" else "cpu-csr-conv"
        return Choice(kernel.registered()[name], {"dense": 10.0, name: 5.0}, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(inference, "speed_of", lambda *call: Speed(200.0, 100.0, 2.0))


def with_dead_neurons() -> Any:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4)),
    )
    with torch.no_grad():
        model[0].weight[5:] = 0
        model[1].bias[5:] = -1
        model[3].bias[5:] = 0
        model[6].weight[9:] = 0
    return model.eval()


def test_layers_print_what_neurons_left_and_a_folded_norm_is_gone() -> None:
    model, x = with_dead_neurons(), torch.randn(2, 3, 6, 6)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    conv, norm, grouped, first, last = (fast.get_submodule(name) for name in "01368")
    assert (conv.in_channels, conv.out_channels, conv.groups) == (3, 5, 1)
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (5, 5, 5)
    assert (first.in_features, first.out_features) == (20, 9)
    assert (last.in_features, last.out_features) == (9, 4)
    assert type(norm) is nn.Identity
    assert (model[0].out_channels, model[6].out_features, type(model[1])) == (8, 12, nn.BatchNorm2d)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-5)


def test_a_transposed_convolution_keeps_its_channels() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)).eval()
    fast = fxsparse.compile(model, mode="infer", example_inputs=torch.randn(1, 4, 5, 5))
    assert str(fast.get_submodule("0")) == str(model[0])


def test_the_activation_of_a_folded_norm_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8)).eval()
    fast = fxsparse.compile(model, mode="infer", example_inputs=torch.randn(1, 3, 5, 5))
    x = torch.randn(2, 3, 5, 5)
    assert not hasattr(fast.get_submodule("1"), "weight") or fast.get_submodule("1").weight is None
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-5)
