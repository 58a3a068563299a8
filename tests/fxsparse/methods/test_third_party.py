"""A package that is not ours adds methods by registering functions: no file of fxsparse knows of it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

PACKAGE = '''
"""Two methods: one that moves entries by the optimizer's momentum, one that learns masks of frozen weights."""
from dataclasses import dataclass

import torch

from fxsparse.method import Choice, Extra, Method, Probe, register
from fxsparse.reparam import Filled, HardMask, ValueMap, Zeros, one_node, with_gradient
from fxsparse.schedule import Constant, Schedule
from fxsparse.scores import magnitude, register_saliency, score_named
from fxsparse.topk import top_mask


@register_saliency
def curvature(scoring):
    return {name: gradient.square() for name, gradient in scoring.gradients().items()}


@one_node
def masked_with_dense_gradient(weight, mask):
    return with_gradient(torch.where(mask, weight.detach(), 0), (weight, None))


@dataclass(frozen=True)
class ByMomentum:
    @property
    def probe(self):
        return Probe.EMA_DENSE

    def __call__(self, view):
        momentum = view.momentum().abs().flatten()
        assert view.active_gradient().shape == view.active.shape
        kept = view.active[: len(view.active) // 2]
        score = momentum.index_fill(0, kept, torch.inf)
        return Choice(top_mask(score, view.nnz).view(view.shape), {"seen": view.extras["seen"] + 1})


@register
def by_momentum(every: int = 2, init: str = "random"):
    return Method(
        name="by_momentum",
        reparam=ValueMap(masked_with_dense_gradient, exact_zeros=True),
        init=score_named(init),
        rule=ByMomentum(),
        schedule=Schedule(every, start=every, drop_fraction=Constant(0.5)),
        source="a toy",
        state=(Extra("seen", Filled(0.0)),),
        keeps_state=True,
    )


@one_node
def scored(weight, mask, scores):
    return with_gradient(torch.where(mask, weight.detach(), 0), (scores, weight.detach()))


@dataclass(frozen=True)
class LargestScore:
    @property
    def probe(self):
        return Probe.NONE

    def __call__(self, view):
        return Choice(view.pattern.project(view.extras["scores"], view.nnz))


@register
def hidden_mask_only():
    return Method(
        name="hidden_mask_only",
        reparam=ValueMap(scored, extras=(Extra("scores", Zeros(), learned=True),)),
        init=magnitude,
        rule=LargestScore(),
        schedule=Schedule(1, start=1),
        source="a toy",
        freezes_weights=True,
    )
'''

PROGRAM = """
import pickle
import toy_methods
import torch
from torch import nn
import fxsparse
from fxsparse import Plan
from fxsparse.pattern import Unstructured
from fxsparse.testing import check_method

for method in (toy_methods.by_momentum(), toy_methods.hidden_mask_only()):
    check_method(method, Unstructured(), (6, 8), 19)


def trained(method, batches=9):
    torch.manual_seed(0)
    plan = Plan.from_dict(Plan(sparsity=0.8, method=method).to_dict())
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    before = model[0].weight.detach().clone()
    scores = None
    if method.options:
        batches_, loss = [torch.randn(4, 16)], lambda m, b: m(b).square().mean()
        scores = fxsparse.saliency(model, plan, loss, batches_)
    sparse = fxsparse.compile(model, plan, initial_scores=scores)
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.1), momentum=0.9)
    sparse.attach(optimizer)
    start = sparse.masks()
    for _ in range(batches):
        optimizer.zero_grad()
        (sparse(torch.randn(8, 16)) - 1).square().mean().backward()
        optimizer.step()
    assert {n: int(m.sum()) for n, m in sparse.masks().items()} == {n: int(m.sum()) for n, m in start.items()}
    assert any(not torch.equal(m, start[n]) for n, m in sparse.masks().items())
    twin = pickle.loads(pickle.dumps(sparse))
    torch.testing.assert_close(twin.eval()(torch.ones(1, 16)), sparse.eval()(torch.ones(1, 16)))
    fast = fxsparse.compile(sparse, mode="infer")
    torch.testing.assert_close(fast(torch.ones(1, 16)), sparse(torch.ones(1, 16)))
    return sparse, optimizer, before


sparse, optimizer, _ = trained(toy_methods.by_momentum())
assert float(sparse.get_buffer("0.weight_seen")) == 4
assert not sparse.get_parameter("0.weight").detach()[~sparse.masks()["0.weight"]].any()
assert optimizer.state[sparse.get_parameter("0.weight")]["momentum_buffer"][~sparse.masks()["0.weight"]].any()
before = sparse.masks()["0.weight"]
(sparse.train()(torch.randn(8, 16)) - 1).square().mean().backward()
optimizer.step()  # the tenth, of an update
pruned = before & ~sparse.masks()["0.weight"]
assert pruned.any()
assert optimizer.state[sparse.get_parameter("0.weight")]["momentum_buffer"][pruned].all()
trained(toy_methods.by_momentum(init="curvature"))
sparse, _, before = trained(toy_methods.hidden_mask_only())
assert torch.equal(sparse.get_parameter("0.weight"), before)
try:
    model = fxsparse.compile(nn.Linear(8, 8), Plan(sparsity=0.5, method=toy_methods.by_momentum(every=1)))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    model.attach(plain)
    model(torch.ones(1, 8)).sum().backward()
    plain.step()
except fxsparse.errors.UnsupportedError as error:
    assert "expected the momentum buffer of SGD(momentum=0.9)" in str(error), error
else:
    raise AssertionError("an optimizer without an average was let through")
print("trained")
"""


def test_a_folder_on_the_path_adds_methods_and_a_score(tmp_path: Path) -> None:
    package = tmp_path / "toy_methods"
    package.mkdir()
    (package / "__init__.py").write_text(PACKAGE)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "trained\n", done.stderr
