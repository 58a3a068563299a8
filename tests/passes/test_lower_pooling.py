import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxsparse.kernels import max_pool2d
from fxsparse.passes import Functionalize, LowerPooling, lower_pooling
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
        lower_pooling,
        "interleaved_quartiles",
        lambda *_, **__: {"torch": 1.0, "ours": 0.5 if faster else 0.96},
    )
    ctx = PassContext(None, "infer", capture(Net().eval(), X, modes=("eval",)), Report(), x)
    if tier is not None:
        ctx.program.tier = tier
    run_passes((Functionalize(), LowerPooling()), ctx)
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
    monkeypatch.setattr(lower_pooling, "interleaved_quartiles", lambda *_, **__: {"torch": 1.0, "ours": 0.5})
    assert not lower_pooling._is_faster(X.to(dtype), {"kernel_size": 2})
