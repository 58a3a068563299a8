"""The structural copy shares tensors and nothing else; graphs run on its own dicts."""

import functools

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from fxsparse.skeleton import bind, copy_structure, substituted


class Tangled(nn.Module):
    """Shared modules, tied parameters, and attributes that mention modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Linear(4, 4)
        self.c.weight = self.a.weight
        self.norm = nn.BatchNorm1d(4)
        self.listed = [self.a, {"c": self.c}]
        self.bound = self.a.forward
        self.partial = functools.partial(self.c.forward)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(x) + self.bound(x) + self.partial(x))


def test_tensors_are_shared_and_modules_are_not() -> None:
    model = Tangled()
    copy = copy_structure(model)
    assert type(copy) is Tangled
    assert list(copy.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(copy.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(copy.buffers(), model.buffers(), strict=True))
    assert not set(copy.modules()) & set(model.modules())
    assert copy.a is copy.b
    assert copy.listed[0] is copy.a
    assert copy.listed[1]["c"] is copy.c
    assert copy.bound.__self__ is copy.a
    assert copy.partial.func.__self__ is copy.c


def test_editing_the_copy_leaves_the_model_alone() -> None:
    model = Tangled()
    copy = copy_structure(model).eval()
    copy.a.register_buffer("mask", torch.ones(4, 4))
    copy.a.weight = nn.Parameter(torch.zeros(4, 4))
    assert "a.mask" not in model.state_dict()
    assert model.a.weight.abs().sum() > 0
    assert model.training


def test_a_bound_graph_sees_every_later_change_of_the_tree() -> None:
    copy = copy_structure(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    gm = bind(symbolic_trace(copy).graph, copy)
    copy.double()
    assert gm(torch.randn(3, 4).double()).dtype == torch.float64
    copy[0].weight = nn.Parameter(torch.zeros(4, 4).double())
    assert next(gm.parameters()) is copy[0].weight
    gm.eval()
    assert not copy[1].training


def test_substituted_tensors_come_back_even_when_replaced() -> None:
    model = Tangled()
    weight, mean = model.a.weight, model.norm.running_mean
    with substituted(model, lambda p: nn.Parameter(p.to("meta")), lambda b: b.clone()):
        assert model.a.weight.is_meta
        assert model.a.weight is model.c.weight
        model.norm.running_mean.add_(1)
        model.norm.num_batches_tracked = torch.tensor(7)
    assert model.a.weight is weight
    assert model.norm.running_mean is mean
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(mean, torch.zeros(4))
