import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxsparse import kernel
from fxsparse.glue import GLUE
from fxsparse.kernels import max_pool2d, scaled_dot_product_attention
from fxsparse.passes import Functionalize, LowerGlue, lower_glue
from fxsparse.pipeline import PassContext, run_passes
from fxsparse.report import Report
from fxsparse.trace import capture


class Net(nn.Module):
    """Pooling as a module and by two spellings, and one whose indices are read."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)

    def forward(self, x):
        x = F.max_pool2d(self.pool(x), 2)
        values, indices = F.max_pool2d(x, 2, return_indices=True)
        return torch.max_pool2d(x, [2, 1]).sum() + values.sum() + indices.sum()


X = torch.randn(2, 3, 40, 40)


def lowered(monkeypatch, faster=True, x=X, tier=None) -> PassContext:
    monkeypatch.setattr(
        lower_glue,
        "interleaved_quartiles",
        lambda *_, **__: {"torch": 1.0, "ours": 0.5 if faster else 0.96},
    )
    ctx = PassContext(None, "infer", capture(Net().eval(), X, modes=("eval",)), Report(), x)
    if tier is not None:
        ctx.program.tier = tier
    run_passes((Functionalize(), LowerGlue()), ctx)
    return ctx


def calls(ctx):
    return ctx.program.graphs["eval"].graph.find_nodes(op="call_function", target=max_pool2d)


def test_every_spelling_is_lowered_but_where_indices_are_wanted(monkeypatch):
    ctx = lowered(monkeypatch)
    assert ctx.report.passes[-1]["rewrites"] == len(calls(ctx)) == 3
    assert calls(ctx)[0].kwargs["ceil_mode"] is True
    torch.testing.assert_close(ctx.program.run("eval", X), Net()(X))


def test_what_is_not_faster_stays(monkeypatch):
    assert not calls(lowered(monkeypatch, faster=False))


def test_nothing_is_lowered_where_nothing_can_be_measured(monkeypatch):
    assert not calls(lowered(monkeypatch, x=None))
    assert not calls(lowered(monkeypatch, tier="walk"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay(dtype, monkeypatch):
    monkeypatch.setattr(lower_glue, "interleaved_quartiles", lambda *_, **__: {"torch": 1.0, "ours": 0.5})
    assert not lower_glue._is_faster(GLUE[0], (X.to(dtype),), {"kernel_size": 2}, [])


class Attention(nn.Module):
    """Calls of attention that are alike, one with a mask, and one that drops."""

    def forward(self, x):
        y = F.scaled_dot_product_attention(x, x, x)
        y = F.scaled_dot_product_attention(y, x, x) + F.scaled_dot_product_attention(x, x, x, x @ x.mT)
        return y + F.scaled_dot_product_attention(x, x, x, None, 1.0)


def attend(monkeypatch, faster=True):
    measured = []

    def quartiles(calls, **_):
        measured.append(calls)
        return {"torch": 1.0, "ours": 0.5 if faster else 0.96}

    monkeypatch.setattr(lower_glue, "interleaved_quartiles", quartiles)
    x = torch.randn(1, 2, 24, 8)
    ctx = PassContext(None, "infer", capture(Attention().eval(), x, modes=("eval",)), Report(), x)
    run_passes((Functionalize(), LowerGlue()), ctx)
    graph = ctx.program.graphs["eval"].graph
    return ctx, graph.find_nodes(op="call_function", target=scaled_dot_product_attention), measured


def test_attention_is_lowered_with_its_mask_and_alike_calls_are_measured_once(monkeypatch):
    ctx, found, measured = attend(monkeypatch)
    assert [len(node.args) for node in found] == [3, 3, 4]
    assert len(measured) == 2
    row = ctx.report.passes[-1]
    assert row["rewrites"] == 3
    assert "scaled_dot_product_attention of [1, 2, 24, 8]" in row["notes"][0]


def test_attention_that_is_not_faster_stays(monkeypatch):
    _, found, measured = attend(monkeypatch, faster=False)
    assert not found
    assert len(measured) == 2


def test_a_result_that_differs_stays(monkeypatch):
    monkeypatch.setitem(kernel._GLUE, "scaled_dot_product_attention", lambda q, k, v, *_: q + 1)
    ctx, found, measured = attend(monkeypatch)
    assert not found
    assert not measured
    assert "differs" in ctx.report.passes[-1]["notes"][0]


def test_a_result_that_lies_otherwise_in_memory_stays(monkeypatch):
    def moved(q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setitem(kernel._GLUE, "scaled_dot_product_attention", moved)
    _, found, measured = attend(monkeypatch)
    assert not found
    assert not measured
