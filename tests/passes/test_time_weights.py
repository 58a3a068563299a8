import torch
import torch.nn.functional as F
from torch import nn

from fxsparse import Budget, Plan
from fxsparse.passes import CollectWeights, Functionalize, InferShapes, split_samples, time_weights
from fxsparse.passes.time_weights import _all_dense
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


def test_weights_are_timed_on_whole_batches(monkeypatch):
    monkeypatch.setattr(split_samples, "_times", lambda gm, x: {1: 1.0, len(x): 9.0})
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(4, 3, 8, 8)
    ctx = PassContext(None, "train", capture(model, x), Report(), x)
    assert "samples_at_once" not in _all_dense(ctx).program.graphs["eval"].code


def test_every_weight_has_a_price_and_dense_is_all_of_them_with_the_rest():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval(), torch.randn(32, 64)
    ctx = PassContext(Plan(budget=Budget(latency=0.5)), "train", capture(model, x), Report(), x)
    run_passes((Functionalize(), InferShapes(), CollectWeights()), ctx)
    prices = time_weights.latency_prices(ctx.program.graphs["eval"], ctx, Budget(latency=0.5))
    full = {name: price.points[-1] for name, price in prices.of.items()}
    assert {name: nnz for name, (nnz, _) in full.items()} == {"0.weight": 64 * 48, "2.weight": 480}
    assert all(cost > 0 for _, cost in full.values())
    assert prices.dense == prices.rest + sum(cost for _, cost in full.values())
    assert prices.cost({"0.weight": 64 * 48, "2.weight": 480}) == prices.dense


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
