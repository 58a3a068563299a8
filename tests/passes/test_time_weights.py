import torch
from torch import nn

from fxsparse.passes import split_samples
from fxsparse.passes.time_weights import _all_dense
from fxsparse.pipeline import PassContext
from fxsparse.report import Report
from fxsparse.trace import capture


def test_weights_are_timed_on_whole_batches(monkeypatch):
    monkeypatch.setattr(split_samples, "_times", lambda gm, x: {1: 1.0, len(x): 9.0})
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(4, 3, 8, 8)
    ctx = PassContext(None, "train", capture(model, x), Report(), x)
    assert "samples_at_once" not in _all_dense(ctx).program.graphs["eval"].code
