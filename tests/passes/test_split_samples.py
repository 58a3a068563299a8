"""Batches that run a few samples at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import inference
from fxsparse.passes import Functionalize, split_samples
from fxsparse.passes.split_samples import SplitSamples
from fxsparse.pipeline import PassContext
from fxsparse.report import Report
from fxsparse.sample_split import SampleSplit
from fxsparse.trace import capture


def unchanged(y):
    return y


class Images(nn.Module):
    """A small residual network; `last` is what it does with its rows."""

    def __init__(self, last=unchanged):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5), last

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu6(x + self.body(x))
        return self.last(self.head(torch.flatten(self.pool(F.max_pool2d(x, 2)), 1)))


def split(model, x, monkeypatch, times=None):
    """(rewrites, graph, notes) with these times, or 2 of the batch at once as the fastest."""
    found = {1: 3.0, 2: 1.0, len(x): 2.0} if times is None else times
    monkeypatch.setattr(split_samples, "_times", lambda gm, x: found)
    ctx = PassContext(None, "infer", capture(model.eval(), x, modes=("eval",)), Report(), x)
    gm = ctx.program.graphs["eval"]
    Functionalize().run(gm, ctx)
    gm.recompile()
    return SplitSamples().run(gm, ctx), gm, ctx.notes


def test_the_fastest_share_is_taken_and_results_are_joined(monkeypatch):
    model, x = Images(), torch.randn(5, 3, 12, 12)
    count, gm, notes = split(model, x, monkeypatch)
    assert (count, notes) == (1, ["2 of 5 samples at once: 2.00x of whole batches"])
    assert type(gm.graph._codegen) is SampleSplit
    assert "@samples_at_once(2)" in gm.code
    with torch.no_grad():
        for batch in (5, 4, 2, 1, 0):
            torch.testing.assert_close(gm(x[:batch]), model(x[:batch]))


def test_whole_batches_stay_where_no_share_is_clearly_faster(monkeypatch):
    times = {1: 1.0, 2: 0.96, 5: 1.0}
    count, gm, notes = split(Images(), torch.randn(5, 3, 12, 12), monkeypatch, times)
    assert (count, notes) == (0, [])
    assert "samples_at_once" not in gm.code


@pytest.mark.parametrize(
    "last",
    [
        lambda y: y - y.mean(0),
        lambda y: y.softmax(0),
        lambda y: y / y.max(),
        lambda y: y.t(),
        lambda y: y.reshape(-1),
        lambda y: y.view(1, -1),
        lambda y: torch.flatten(y),
        lambda y: y + 1,
        lambda y: y + torch.arange(5.0)[:, None],
        lambda y: (y, y),
    ],
)
def test_what_may_mix_samples_stays_whole(last, monkeypatch):
    assert split(Images(last), torch.randn(5, 3, 12, 12), monkeypatch)[0] == 0


@pytest.mark.parametrize("size", [(1, 3, 12, 12), (3, 12, 12)])
def test_a_batch_of_one_and_a_single_image_stay_whole(size, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert split(model, torch.randn(size), monkeypatch, {1: 1.0})[0] == 0


def test_compiled_models_keep_it_in_copies_and_pickles(monkeypatch, tmp_path):
    monkeypatch.setattr(split_samples, "_times", lambda gm, x: {2: 1.0, len(x): 2.0})
    monkeypatch.setattr(inference, "NEVER_SLOWER", 0.0)
    torch.manual_seed(0)
    model, x = Images().eval(), torch.randn(4, 3, 12, 12)
    fast = fxsparse.compile(model, mode="infer", example_inputs=x)
    torch.save(fast, tmp_path / "fast.pt")
    for other in (fast, copy.deepcopy(fast), torch.load(tmp_path / "fast.pt", weights_only=False)):
        assert "@samples_at_once(2)" in other.forward_graph.code
        with torch.no_grad():
            torch.testing.assert_close(other(x), model(x))


def test_every_share_of_the_batch_is_timed():
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    assert sorted(split_samples._times(gm, torch.randn(5, 1, 2, 2))) == [1, 2, 4, 5]
