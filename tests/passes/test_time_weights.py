import torch
import torch.nn.functional as F
from torch import nn

from fxsparse.passes import split_samples, time_weights
from fxsparse.passes.time_weights import _all_dense
from fxsparse.pipeline import PassContext
from fxsparse.report import Report
from fxsparse.trace import capture


def test_weights_are_timed_on_whole_batches(monkeypatch):
    monkeypatch.setattr(split_samples, "_times", lambda gm, x: {1: 1.0, len(x): 9.0})
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(4, 3, 8, 8)
    ctx = PassContext(None, "train", capture(model, x), Report(), x)
    assert "samples_at_once" not in _all_dense(ctx).program.graphs["eval"].code


def test_other_ops_are_timed_where_they_are_without_the_priced_calls(monkeypatch):
    seen = []
    monkeypatch.setattr(time_weights, "_model_us", lambda ctx: seen.append(ctx) or 7.0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    folded = _all_dense(PassContext(None, "train", capture(model, x), Report(), x))
    graph = folded.program.graphs["eval"].graph
    linears = graph.find_nodes(op="call_function", target=F.linear)
    assert time_weights._others_us(folded, {linears[0].name}) == 7.0
    (held,) = seen
    first = held.program.run("eval", x)
    torch.testing.assert_close(first, model(x))
    torch.testing.assert_close(held.program.run("eval", torch.zeros_like(x)), first)
    assert [node.target for node in graph.find_nodes(op="call_function", target=F.linear)] == [F.linear] * 2
