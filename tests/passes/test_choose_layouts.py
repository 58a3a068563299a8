import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse import inference
from fxsparse.image_ops import COPIES, channels_first, channels_last
from fxsparse.passes import choose_layouts
from fxsparse.passes.choose_layouts import _Costs


class Net(nn.Module):
    """Three convolutions around a residual, a concatenation and a pooling, and an op that reads memory in order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.pool = nn.Conv2d(16, 4, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = torch.cat([x, self.b(x) + x], 1)
        return self.c(self.pool(x)).view(x.shape[0], -1)


@pytest.fixture
def priced(monkeypatch):
    """Compile `Net` where convolutions cost as given, {name: (channels first, channels last)}, and copies 1."""

    def build(**costs: tuple[float, float]):
        def cost(gm, site, x, decision):
            first, last = costs[site.weight.target.partition(".")[0]]
            return _Costs(first, last, float(x.numel()))

        monkeypatch.setattr(choose_layouts, "_costs", cost)
        monkeypatch.setattr(inference, "NEVER_SLOWER", 0.0)
        torch.manual_seed(0)
        model, x = Net().eval(), torch.randn(2, 3, 8, 8)
        fast = fxsparse.compile(model, mode="infer", example_inputs=x)
        torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-5)
        copies = [node.target for node in fast.forward_graph.graph.nodes if node.target in COPIES]
        return {
            row["name"][0] for row in fast.report.layers if row["reason"].startswith("channels last")
        }, copies

    return build


def test_cheap_convolutions_hold_channels_last_between_two_copies(priced):
    last, copies = priced(a=(9e9, 1), b=(9e9, 1), c=(9e9, 1))
    assert last == {"a", "b", "c"}
    # The input before, and what `view` reads after.
    assert copies == [channels_last, channels_first]


def test_what_saves_less_than_its_copies_stays(priced):
    last, copies = priced(a=(2, 1), b=(2, 1), c=(2, 1))
    assert (last, copies) == (set(), [])


def test_one_convolution_holds_channels_last_alone_where_it_saves_enough(priced):
    last, copies = priced(a=(1, 9e9), b=(9e9, 1), c=(1, 9e9))
    assert (last, copies) == ({"b"}, [channels_last, channels_first])


@torch.library.custom_op("fxsparse_layouts::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An op whose result has no shape before it ran."""
    return 2 * x


def test_a_convolution_behind_an_op_without_shapes_keeps_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(doubled(self.a(x)))

    monkeypatch.setattr(choose_layouts, "_costs", lambda *_: _Costs(9e9, 1.0, 1.0))
    monkeypatch.setattr(inference, "NEVER_SLOWER", 0.0)
    model, x = Doubled().eval(), torch.randn(2, 3, 8, 8)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    held = {row["name"] for row in fast.report.layers if row["reason"].startswith("channels last")}
    assert held == {"a.weight"}
