"""Which calls the probe graph watches, and that it computes the same."""

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.kernels import probe
from fxsparse.methods import gse, rigl


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, output_padding=1, stride=2)
        self.head = nn.Linear(4, 5)
        self.twice = nn.Linear(5, 5)

    def forward(self, x):
        x = self.head(self.up(self.conv(x).relu()).mean((2, 3)))
        return self.twice(self.twice(x).relu())


def build(method, storage="masked", model=None):
    return fxsparse.compile(model or Net(), Plan(sparsity=0.5, storage=storage, method=method))


def arm(sparse):
    sparse._emitted.updates.switch.on = True
    return sparse._emitted.program.switch


def test_masked_ops_are_watched_with_their_arguments_only_where_the_rule_asks():
    assert build(gse())._emitted.program.switch.watched == []
    assert build(rigl())._emitted.program.switch.watched == []
    watched = build(gse(sampling="grabo"))._emitted.program.switch.watched
    assert [(w.name, w.op.__name__) for w in watched] == [
        ("conv.weight", "conv2d"), ("up.weight", "conv_transpose2d"), ("head.weight", "linear"),
        ("twice.weight", "linear"),
    ]  # fmt: skip
    assert watched[1].arguments == {
        "stride": (2, 2), "padding": (0, 0), "output_padding": (1, 1), "groups": 1, "dilation": (1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_left_behind_is_the_dense_gradient(compiled):
    torch._dynamo.reset()
    sparse, x = build(gse(sampling="graest")), torch.randn(2, 3, 9, 9)
    expected = sparse(x)
    switch = arm(sparse)
    call = torch.compile(sparse, backend="aot_eager", fullgraph=True) if compiled else sparse
    y = call(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    for name, weight in sparse.weights():
        seen = switch.observed(name)
        assert len(seen) == (2 if name == "twice.weight" else 1)
        total = 0
        for one in seen:
            for term in torch.eye(one.terms):
                columns, rows = one.sums(weight.shape, term)
                total = total + rows.unsqueeze(1) * columns
        torch.testing.assert_close(total, weight.parameter.grad.flatten(1), rtol=1e-4, atol=1e-4)
        for key in switch.keys(name):
            probe.clear(key)


def test_a_weight_that_is_read_in_parts_is_not_watched_and_the_report_says_so():
    torch.manual_seed(0)
    block = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 8)
    plan = Plan(sparsity=0.5, storage="masked", method=gse(sampling="grabo", every=1))
    sparse = fxsparse.compile(block, plan, example_inputs=(x, x))
    assert "linear1.weight" in {w.name for w in sparse._emitted.program.switch.watched}
    (row,) = [row for row in sparse.report.passes if row["name"] == "insert-mask-updates"]
    said = [note for note in row["notes"] if "sampled uniformly" in note]
    assert said
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    before = sparse.masks()
    for _ in range(2):
        sparse(x, x).square().sum().backward()
        optimizer.step()
    name = said[0].partition(":")[0]
    assert not torch.equal(sparse.masks()[name], before[name])
