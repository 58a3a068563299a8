"""Which calls the probe graph watches, and that it computes the same."""

import pytest
import torch
import torch.nn.functional as F
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


class Cross(nn.Module):
    """Cross-attention: queries from one sequence, keys and values from another."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, memory):
        return self.attention(x, memory, memory, need_weights=False)[0]


def test_what_the_thirds_of_a_packed_projection_leave_behind_is_its_gradient():
    torch.manual_seed(0)
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    plan = Plan(sparsity=0.5, storage="masked", method=gse(sampling="grabo"))
    sparse = fxsparse.compile(Cross(), plan, example_inputs=(x, memory))
    switch, name = arm(sparse), "attention.in_proj_weight"
    sparse(x, memory).square().sum().backward()
    seen, total = switch.observed(name), torch.zeros(24, 8)
    assert [(one.terms, one.arguments["part"]) for one in seen].count((10, (2, 3))) == 1
    assert sorted(one.terms for one in seen) == [6, 10, 10]
    for one in seen:
        for term in torch.eye(one.terms):
            columns, rows = one.sums((24, 8), term)
            assert columns.shape == (3, 8)
            total += rows.unsqueeze(1) * columns.repeat_interleave(8, 0)
    gradient = dict(sparse.weights())[name].parameter.grad
    torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-5)
    for key in switch.keys(name):
        probe.clear(key)


class Uneven(nn.Module):
    """A weight that is read in pieces of 2 and 6 rows."""

    def __init__(self):
        super().__init__()
        self.linear1, self.packed = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x, memory):
        small, large = self.packed.split([2, 6])
        return torch.cat([F.linear(self.linear1(x), small), F.linear(memory, large)], -1)


def test_a_weight_that_is_read_in_uneven_parts_is_not_watched_and_the_report_says_so():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    plan = Plan(sparsity=0.5, storage="masked", method=gse(sampling="grabo", every=1))
    sparse = fxsparse.compile(Uneven(), plan, example_inputs=(x, x))
    assert "linear1.weight" in {w.name for w in sparse._emitted.program.switch.watched}
    (row,) = [row for row in sparse.report.passes if row["name"] == "insert-mask-updates"]
    said = [note for note in row["notes"] if "sampled uniformly" in note]
    assert [note.partition(":")[0] for note in said] == ["packed"]
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    before = sparse.masks()
    for _ in range(2):
        sparse(x, x).square().sum().backward()
        optimizer.step()
    name = said[0].partition(":")[0]
    assert not torch.equal(sparse.masks()[name], before[name])


def test_cross_attention_is_updated_by_what_was_seen():
    torch.manual_seed(0)
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    memory[..., 1:] = 0  # keys and values can only learn from the first input
    plan = Plan(sparsity=0.8, storage="masked", method=gse(sampling="grabo", every=1, drop_fraction=0.5))
    sparse = fxsparse.compile(Cross(), plan, example_inputs=(x, memory))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    before = sparse.masks()["attention.in_proj_weight"]
    for _ in range(3):
        sparse(x, memory).square().sum().backward()
        optimizer.step()
    grown = sparse.masks()["attention.in_proj_weight"] & ~before
    assert grown[:8, 1:].any(), "queries are drawn by their own inputs"
    assert not grown[8:, 1:].any()
