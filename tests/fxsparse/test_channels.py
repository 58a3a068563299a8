"""The channel dependency graph by itself: ties, groups, stops with reasons, and constants."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models import resnet18
from torchvision.ops import StochasticDepth

from fxsparse.channels import Axis, ChannelGraph, Tie, constant_channels, trace_channels
from fxsparse.channels.shapes import coordinates, matched
from fxsparse.passes import CollectWeights, Functionalize, InferShapes, RemoveIdentities
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


def graph_of(model: nn.Module, *shape: int, mode: str = "eval", tier: str | None = None) -> GraphModule:
    x, training = torch.randn(shape), mode == "train"
    ctx = PassContext(None, "infer", capture(model.train(training), x, modes=(mode,), tier=tier), Report(), x)
    ctx.program.skeleton.train(training)
    run_passes([Functionalize(), InferShapes(), CollectWeights(), RemoveIdentities()], ctx)
    return ctx.program.graphs[mode]


def same(graph: ChannelGraph, a: Axis, b: Axis) -> list[tuple[int, int]]:
    """Pairs of positions of two axes that are one channel."""
    channels = graph.channels()
    return [(int(i), int(j)) for i, x in enumerate(channels[a]) for j, y in enumerate(channels[b]) if x == y]


IDENTITY = [(k, k) for k in range(4)]


@pytest.mark.parametrize(
    ("between", "shape", "after"),
    [
        ([nn.ReLU()], (2, 3), nn.Linear(4, 2)),
        ([nn.GELU(), nn.Dropout(0.1), nn.Identity(), nn.Hardswish()], (2, 5, 3), nn.Linear(4, 2)),
        ([nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2)], (2, 3, 6, 6), nn.Conv2d(4, 2, 3)),
        ([nn.AdaptiveAvgPool2d(1), nn.Flatten()], (2, 3, 6, 6), nn.Linear(4, 2)),
        ([nn.Conv2d(4, 4, 3, groups=4), nn.AvgPool2d(2)], (2, 3, 6, 6), nn.Conv2d(4, 2, 1)),
    ],
)
def test_a_row_is_the_column_that_reads_it(
    between: list[nn.Module], shape: tuple[int, ...], after: nn.Module
) -> None:
    first = nn.Linear(3, 4) if len(shape) < 4 else nn.Conv2d(3, 4, 1)
    model = nn.Sequential(first, *between, after)
    graph = trace_channels(graph_of(model, *shape)).graph
    last = f"{len(model) - 1}.weight"
    assert same(graph, Axis("0.weight", 0), Axis(last, 1)) == IDENTITY
    assert same(graph, Axis("0.weight", 0), Axis("0.bias", 0)) == IDENTITY
    assert same(graph, Axis("0.weight", 0), Axis(last, 0)) == []
    (group,) = [group for group in graph.groups() if Axis("0.weight", 0) in group]
    assert Axis(last, 1) in group
    assert not group & graph.stops.keys()


def test_flatten_maps_a_channel_to_a_block_of_columns() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 2))
    graph = trace_channels(graph_of(model, 2, 3, 2, 2)).graph
    blocks = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 6), (1, 7)]
    assert same(graph, Axis("0.weight", 0), Axis("2.weight", 1)) == blocks


def test_flatten_of_channels_that_lie_last_maps_a_channel_to_every_nth_column() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Flatten(), nn.Linear(6, 2))
    graph = trace_channels(graph_of(model, 2, 3, 3)).graph
    every = [(0, 0), (0, 2), (0, 4), (1, 1), (1, 3), (1, 5)]
    assert same(graph, Axis("0.weight", 0), Axis("2.weight", 1)) == every


class Wiring(nn.Module):
    """Two producers: concatenated, cut in pieces of another width, permuted, added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)
        self.left, self.right = nn.Conv2d(3, 2, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.cat([self.a(x), self.b(x)], dim=1).split(3, dim=1)
        return self.left(left).mean() + self.right((left + right).permute(0, 2, 3, 1)).mean()


def test_concatenation_pieces_permutation_and_sums() -> None:
    graph = trace_channels(graph_of(Wiring(), 2, 3, 5, 5)).graph
    # pieces [a0 a1 b0] and [b1 b2 b3], tied by their sum
    assert same(graph, Axis("a.weight", 0), Axis("left.weight", 1)) == [(0, 0), (1, 1)]
    assert same(graph, Axis("b.weight", 0), Axis("left.weight", 1)) == [(0, 2), (1, 0), (2, 1), (3, 2)]
    assert same(graph, Axis("b.weight", 0), Axis("right.weight", 1)) == [(0, 2), (1, 0), (2, 1), (3, 2)]


def test_a_shared_weight_ties_what_its_call_sites_read() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(x)) - self.out(self.b(x))

    graph = trace_channels(graph_of(Shared(), 2, 3)).graph
    assert same(graph, Axis("a.weight", 0), Axis("b.weight", 0)) == IDENTITY
    assert [str(c.weight) for c in graph.contractions].count("out.weight[1]") == 2


def test_a_grouped_convolution_ties_whole_groups() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 6, 1, groups=2))
    graph = trace_channels(graph_of(model, 2, 3, 5)).graph
    pairs = same(graph, Axis("0.weight", 0), Axis("1.weight", 0))
    assert pairs == [(i, j) for i in range(4) for j in range(6) if i // 2 == j // 3]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm(4), "LayerNorm 1 mixes its channels"),
        (nn.GroupNorm(2, 4), "GroupNorm 1 mixes its channels"),
        (nn.Softmax(-1), "Softmax 1 mixes its channels"),
        (nn.GLU(), "GLU 1 is not known to keep channels apart"),
        (nn.Unflatten(1, (2, 2)), None),
        (nn.Identity(), "it is an output of the model"),
        (nn.BatchNorm1d(4, track_running_stats=False), "BatchNorm1d 1 takes statistics of the batch"),
    ],
)
def test_every_stop_has_its_reason(module: nn.Module, reason: str | None) -> None:
    traced = trace_channels(graph_of(nn.Sequential(nn.Linear(3, 4), module), 2, 3))
    (group,) = [group for group in traced.graph.groups() if Axis("0.weight", 0) in group]
    reasons = [traced.graph.stops[axis] for axis in group if axis in traced.graph.stops]
    assert reasons
    assert reason is None or reason in reasons


class Branch(nn.Module):
    """A residual whose branch ends on what training does otherwise than evaluation."""

    def __init__(self, *behind: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.behind, self.out = nn.Sequential(*behind), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.out((x + self.behind(self.b(x))).relu())


@pytest.mark.parametrize("tier", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("behind", "reason"),
    [
        ([nn.BatchNorm2d(4)], "takes statistics of the batch"),
        ([nn.BatchNorm2d(4, affine=False, track_running_stats=False)], "takes statistics of the batch"),
        ([nn.Dropout(0.1)], "draws random numbers"),
        ([nn.Dropout2d(0.1)], "draws random numbers"),
        ([StochasticDepth(0.1, "row")], None),
    ],
)
def test_in_training_channels_are_the_same_but_stay(
    tier: str, behind: list[nn.Module], reason: str | None
) -> None:
    graph = trace_channels(graph_of(Branch(*behind), 2, 3, 2, 2, mode="train", tier=tier)).graph
    assert same(graph, Axis("a.weight", 0), Axis("b.weight", 0)) == IDENTITY
    assert same(graph, Axis("a.weight", 0), Axis("out.weight", 1)) == IDENTITY
    (group,) = [group for group in graph.groups() if Axis("a.weight", 0) in group]
    assert reason is None or any(reason in graph.stops.get(axis, "") for axis in group)


def test_the_blocks_of_resnet18_add_up_the_same_channels() -> None:
    with torch.device("meta"):
        graph = graph_of(resnet18(), 2, 3, 32, 32, mode="train", tier="symbolic")
    channels = trace_channels(graph).graph.channels()
    rows = {
        name: channels[Axis(f"{name}.weight", 0)].tolist()
        for name, _ in graph.named_modules()
        if Axis(f"{name}.weight", 0) in channels
    }
    assert rows["conv1"] == rows["layer1.0.conv2"] == rows["layer1.1.conv2"]
    for k in (2, 3, 4):
        assert rows[f"layer{k}.0.conv2"] == rows[f"layer{k}.0.downsample.0"] == rows[f"layer{k}.1.conv2"]
    convolutions = {tuple(rows[name]) for name in rows if "bn" not in name and name != "fc"}
    assert len(convolutions) == 4 + 8  # one for each stage, and for the inside of each block


def test_what_lies_along_the_input_stops() -> None:
    graph = trace_channels(graph_of(nn.Linear(3, 4), 2, 3)).graph
    (axis,) = [axis for axis in graph.stops if str(axis) == "x[1]" or str(axis) == "input_1[1]"]
    assert graph.stops[axis] == "it is an input of the model"


def test_channels_are_found_through_chains_of_ties() -> None:
    graph, axes = ChannelGraph(), [Axis(name, 0) for name in "abc"]
    for axis in axes:
        graph.add(axis, 3)
    graph.tie(Tie(axes[2], axes[1], np.array([0, 1]), np.array([2, 1])))
    graph.tie(Tie(axes[0], axes[1], np.array([2, 0]), np.array([1, 2])))
    channels = graph.channels()
    a, b, c = (channels[axis].tolist() for axis in axes)
    assert a[2] == b[1] == c[1]
    assert a[0] == b[2] == c[0]
    assert len({*a, *b, *c}) == 5


# -- constants -----------------------------------------------------------------------------------------------


def constants_of(model: nn.Module, *shape: int) -> dict[int, float]:
    """{position of the last layer's input: its constant}"""
    gm = graph_of(model, *shape)
    traced = trace_channels(gm)
    found = constant_channels(gm, traced)[traced.graph.contractions[-1].input]
    return {int(k): float(found.values[k]) for k in found.known.nonzero()}


@torch.no_grad()
def test_a_row_of_zeros_holds_its_bias_through_activation_and_norm() -> None:
    norm = nn.BatchNorm1d(3, eps=1.0)
    norm.get_buffer("running_mean").fill_(1.0)
    norm.get_buffer("running_var").fill_(3.0)
    model = nn.Sequential(nn.Linear(2, 3), nn.GELU(), norm, nn.Linear(3, 1))
    model[0].weight[1] = 0
    model[0].bias[1] = 2.0
    assert constants_of(model, 4, 2) == {1: pytest.approx((F.gelu(torch.tensor(2.0)).item() - 1) / 2)}


@torch.no_grad()
@pytest.mark.parametrize(("padding", "known"), [(0, [0, 1]), (1, [1])])
def test_a_padded_convolution_takes_only_the_constant_zero_on(padding: int, known: list[int]) -> None:
    middle = nn.Conv2d(2, 2, 3, padding=padding, groups=2)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), middle, nn.Conv2d(2, 1, 1))
    model[0].weight.zero_()
    model[0].bias.copy_(torch.tensor([0.5, 0.0]))
    assert list(constants_of(model, 1, 2, 4, 4)) == known


@torch.no_grad()
def test_a_row_that_reads_constants_alone_is_one() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].weight[0] = 0
    model[0].bias[0] = 2.0
    model[1].weight[1] = torch.tensor([3.0, 0.0, 0.0])
    model[1].bias[1] = 1.0
    assert constants_of(model, 4, 2) == {1: 7.0}


# -- reshapes ------------------------------------------------------------------------------------------------


def test_matched_dimensions() -> None:
    assert matched((6, 4), (6, 4)) == [([0], [0]), ([1], [1])]
    assert matched((2, 3, 4, 5), (2, 60)) == [([0], [0]), ([1, 2, 3], [1])]
    assert matched((2, 12), (2, 3, 1, 4)) == [([0], [0]), ([1], [1, 3])]
    assert matched((4, 6), (3, 8)) == [([0, 1], [0, 1])]
    assert matched((2, 3), (5,)) is None
    assert coordinates((2, 3), 1).tolist() == [0, 1, 2, 0, 1, 2]
    assert coordinates((2, 3), 0).tolist() == [0, 0, 0, 1, 1, 1]


class Restored(nn.Module):
    """A size that a view is asked for as one value of the graph, as in GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.view(-1, x.size(-1)))
        return self.second(y.view((*x.size()[:-1], 8)).relu())


def test_a_view_to_one_computed_size_is_read() -> None:
    graph = trace_channels(graph_of(Restored(), 5, 6)).graph
    rows, columns = Axis("first.weight", 0), Axis("second.weight", 1)
    assert same(graph, rows, columns) == [(k, k) for k in range(8)]
