"""Models of one class share Dynamo's graph: each has packed weights of its own, a report, and the right numbers."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from fxsparse.backend import entry, running
from fxsparse.backend import fxsparse as backend
from fxsparse.errors import UnsupportedError
from tests.fxsparse.backend.conftest import prune_

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def make(keep: float = 0.2) -> nn.Module:
    return prune_(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval(), keep)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The packed graph of every call that ran on one."""
    seen: list[object] = []
    run = running.Packed.run

    def spied(self, args):
        seen.append(self)
        return run(self, args)

    monkeypatch.setattr(running.Packed, "run", spied)
    return seen


def test_models_of_one_class_are_packed_each_and_stay_so_in_turns(ran):
    models = [make() for _ in range(3)]
    compiled = [torch.compile(model, backend=backend) for model in models]
    with torch.no_grad():
        for _ in range(4):
            for call, model in zip(compiled, models, strict=True):
                torch.testing.assert_close(call(X), model(X))
        assert len(entry.reports()) == 3
        assert all(len(report.layers) == 2 for report in entry.reports())
        ran.clear()
        for call in compiled:
            call(X)
    assert len(set(map(id, ran))) == 3
    assert "other Parameters run this graph" in entry.reports()[0].notes[-1]
    assert entry.reports()[2].notes[-1] == "other Parameters of a compiled graph: packed"
    gone = weakref.ref(models[1][0].weight)
    del models, compiled, call, model
    ran.clear()
    gc.collect()
    assert gone() is None


def test_a_model_without_zeros_leaves_the_kernels_to_the_next(ran):
    dense, pruned = make(keep=1.0), make()
    calls = [torch.compile(model, backend=backend) for model in (dense, pruned, dense)]
    with torch.no_grad():
        for _ in range(3):
            for call, model in zip(calls, (dense, pruned, dense), strict=True):
                torch.testing.assert_close(call(X), model(X))
    assert len(ran) == 2
    assert [len(report.layers) for report in entry.reports()] == [0, 2]


def test_a_graph_tells_a_limited_number_apart_and_says_so(ran, monkeypatch):
    monkeypatch.setattr(running, "SETS", 2)
    models = [make() for _ in range(3)]
    calls = [torch.compile(model, backend=backend) for model in models]
    with torch.no_grad():
        for _ in range(3):
            for call, model in zip(calls, models, strict=True):
                torch.testing.assert_close(call(X), model(X))
    assert len(set(map(id, ran))) == 2
    assert "2 sets of Parameters share this graph: further ones run dense" in entry.reports()[0].notes


def test_in_training_no_further_model_is_packed(ran):
    models = [make(), make()]
    expected = copy.deepcopy(models)
    calls = [torch.compile(model, backend=backend) for model in models]
    for _ in range(3):
        for pair in (calls, expected):
            sum(call(X).square().sum() for call in pair).backward()
    assert len(ran) == 1
    for model, other in zip(models, expected, strict=True):
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    assert "others that were not packed by then stay dense" in entry.reports()[0].notes[-1]


def test_gradients_of_gradients_are_refused_by_name():
    x = X.clone().requires_grad_()
    y = torch.compile(make(), backend=backend)(x)
    with pytest.raises(UnsupportedError, match=r"got create_graph=True.* that is not compiled"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not grad.requires_grad
