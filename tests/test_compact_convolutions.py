"""Convolutions that train as nonzeros: the same run as in masked storage, and all that a module can do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.methods import gse, rigl, set_, srigl, static
from fxsparse.pattern import NM
from fxsparse.storage import CompactWeight
from fxsparse.testing import forbid_tensors_of

METHODS = {
    "rigl": lambda: rigl(every=3, stop=1000),
    "set": lambda: set_(every=3),
    "srigl": lambda: srigl(every=3, stop=1000),
    "gse": lambda: gse(every=3, stop=1000, drop_fraction=0.3),
    "gse graest": lambda: gse(every=3, stop=1000, drop_fraction=0.3, sampling="graest"),
    "static": static,
}


class Net(nn.Module):
    """One and two dimensions, strides, groups, a shape-keeping padding, and a weight that is applied twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.grouped, self.narrow = nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.Conv1d(16, 12, 4, dilation=2)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x).relu()).relu()).relu()
        return self.out(self.narrow(self.grouped(x).relu().flatten(2)).relu().mean(2))


def train(storage, method, steps=30, micro_batches=1):
    """A trained module, and its masks after every step."""
    torch.manual_seed(0)
    plan = Plan(sparsity=0.7, storage=storage, method=method)
    sparse = fxsparse.compile(Net().double(), plan)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    sparse.attach(optimizer)
    generator, history = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 3, 10, 9, generator=generator, dtype=torch.float64)
        target = torch.randint(4, (8,), generator=generator)
        for part, labels in zip(x.chunk(micro_batches), target.chunk(micro_batches), strict=True):
            (F.cross_entropy(sparse(part), labels) / micro_batches).backward()
        optimizer.step()
        history.append(sparse.masks())
    return sparse, history


@pytest.mark.parametrize("name", METHODS)
def test_compact_storage_trains_as_masked_storage_does(name):
    (masked, picked), (compact, chosen) = (train(s, METHODS[name]()) for s in ("masked", "compact"))
    assert sum(isinstance(weight, CompactWeight) for _, weight in compact.weights()) == 5
    for one, other in zip(picked, chosen, strict=True):
        assert all(torch.equal(mask, other[key]) for key, mask in one.items())
    moved = any(not torch.equal(mask, chosen[0][key]) for key, mask in chosen[-1].items())
    assert moved == (name != "static")
    expected = masked.dense_state_dict()
    for key, value in compact.dense_state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9)


def test_micro_batches_add_up():
    (_, whole), (_, parts) = (train("compact", METHODS["rigl"](), micro_batches=n) for n in (1, 4))
    assert all(torch.equal(mask, parts[-1][key]) for key, mask in whole[-1].items())


def test_patterns_see_the_weight_in_its_own_shape():
    model, x = nn.Conv2d(8, 4, 3, padding=1), torch.randn(2, 8, 5, 5)
    plan = Plan(pattern=NM(2, 4), storage="compact", allocation="uniform", method=static())
    sparse = fxsparse.compile(model, plan)
    [(_, weight)] = sparse.weights()
    assert isinstance(weight, CompactWeight)
    assert weight.shape == sparse.masks()["weight"].shape == (4, 8, 3, 3)
    NM(2, 4).check(sparse.masks()["weight"])
    torch.testing.assert_close(sparse(x), sparse.to_dense()(x))


def test_checkpoints_go_on_bit_for_bit_and_inference_computes_the_same():
    sparse, _ = train("compact", METHODS["rigl"](), steps=7)
    fresh = fxsparse.compile(Net().double(), Plan(sparsity=0.7, storage="compact", method=METHODS["rigl"]()))
    fresh.load_state_dict(copy.deepcopy(sparse.state_dict()))
    x = torch.randn(4, 3, 10, 9, dtype=torch.float64)
    assert torch.equal(fresh.eval()(x), sparse.eval()(x))
    dense = sparse.to_dense().eval()
    torch.testing.assert_close(dense(x), sparse(x))
    torch.testing.assert_close(fxsparse.compile(sparse, mode="infer", example_inputs=x)(x), dense(x))
    again = Net().double()
    again.load_state_dict(sparse.dense_state_dict())
    torch.testing.assert_close(again.eval()(x), dense(x))


@pytest.mark.parametrize("method", ["rigl", "gse graest"])
def test_no_tensor_of_the_dense_weights_size_from_creation_to_update(method):
    channels, numel = 256, 256 * 256 * 9
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
        )
    plan = Plan(sparsity=0.99, storage="compact", allocation="er_unrolled", method=METHODS[method]())
    with forbid_tensors_of(numel // 15):  # RigL looks at the dense gradient in tiles of 1/16
        sparse = fxsparse.compile(model, plan)
        optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
        sparse.attach(optimizer)
        before = sparse.state_dict()["0.weight.indices"].clone()
        for _ in range(4):
            sparse(torch.randn(2, channels, 4, 4)).square().mean().backward()
            optimizer.step()
    assert not torch.equal(before, sparse.state_dict()["0.weight.indices"])


def test_compiles_without_graph_breaks():
    sparse = fxsparse.compile(Net(), Plan(sparsity=0.7, storage="compact"))
    x = torch.randn(2, 3, 10, 9)
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), sparse(x))
