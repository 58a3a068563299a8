from dataclasses import dataclass

import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.method import Method, Probe
from fxsparse.methods import set_
from fxsparse.reparam import HardMask
from fxsparse.schedule import Schedule
from fxsparse.scores import magnitude

SEEN: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class Looks:
    """A rule that keeps its mask and notes which weights it was told to feed."""

    @property
    def probe(self) -> Probe:
        return Probe.TOPOLOGY

    def __call__(self, view):
        SEEN[view.name] = view.feeds
        return view.active


LOOKS = Method("looks", HardMask(), magnitude, "a test", rule=Looks(), schedule=Schedule(1, start=1))


def feeds(model, x, method=LOOKS):
    SEEN.clear()
    sparse = fxsparse.compile(
        model, Plan(sparsity=0.5, method=method, allocation="uniform", storage="masked")
    )
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    sparse(x).sum().backward()
    optimizer.step()
    return dict(SEEN), sparse


def test_consecutive_linear_layers_feed_each_other_through_what_treats_neurons_alone():
    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(8, 8),
        nn.GELU(),
        nn.Linear(8, 4),
    )
    found, sparse = feeds(model, torch.randn(4, 8))
    assert found == {"0.weight": ("4.weight",), "4.weight": ("6.weight",), "6.weight": ()}
    rows = {row["name"]: row for row in sparse.report.passes}
    assert rows["find-chains"]["notes"] == ["6.weight feeds no other sparse weight alone"]


class Joined(nn.Module):
    """A residual connection, a normalisation over neurons, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.last, self.tied = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x).relu()
        x = x + self.second(x)
        x = self.norm(self.third(x))
        return self.tied(self.tied(self.last(x)).relu())


def test_a_residual_connection_a_norm_and_a_second_call_end_a_chain():
    found, _ = feeds(Joined(), torch.randn(4, 8))
    assert set(found.values()) == {()}


def test_other_methods_are_told_nothing():
    sparse = fxsparse.compile(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), Plan(sparsity=0.5, method=set_())
    )
    rows = {row["name"]: row for row in sparse.report.passes}
    assert rows["find-chains"]["notes"] == []
