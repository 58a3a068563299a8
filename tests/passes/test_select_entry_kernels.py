"""Weights that do not fit as dense ones: which kernel serves their nonzeros, and what the report says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from fxsparse import Plan, choosing, kernel, module
from fxsparse.choosing import Choice
from fxsparse.methods import static
from fxsparse.pattern import ConstantFanIn


class Shared(nn.Module):
    """One layer called twice, on different inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, x):
        return self.layer(F.relu(self.layer(x)) + 1)


X = torch.randn(6, 48)


@pytest.fixture(autouse=True)
def nothing_fits(monkeypatch):
    monkeypatch.setattr(module, "MAX_DENSE_BYTES", 0)


def served(model=None, x=X, **options):
    plan = Plan(sparsity=0.8, method=static("random"), storage="compact", **options)
    sparse = fxsparse.compile(model or Shared(), plan, example_inputs=X)
    return fxsparse.compile(sparse, mode="infer", example_inputs=x), sparse


def test_the_fastest_over_all_call_sites_on_their_own_inputs(monkeypatch):
    seen = []

    def choose(problem, x, weight, bias=None, activation="none", **options):
        seen.append((x, activation, problem.batch, problem.nnz))
        times = [{"cpu-csr": 9.0, "cpu-condensed": 1.0}, {"cpu-csr": 1.0, "cpu-condensed": 8.0}][
            len(seen) - 1
        ]
        return Choice(kernel.registered()["cpu-condensed"], times, {}, "measured")

    monkeypatch.setattr(choosing, "choose", choose)
    fast, _ = served(pattern=ConstantFanIn())
    row = fast.report.layers[0]
    # 9 us against 10 us in all, though CSR is the faster one at the first site
    assert row["kernel"] == "cpu-condensed"
    assert row["sparse_us"] == 9.0


def test_inputs_are_those_of_the_graph(monkeypatch):
    seen, choose = [], choosing.choose

    def spy(problem, x, weight, bias=None, activation="none", **options):
        seen.append((x, activation, problem.batch, problem.nnz))
        return choose(problem, x, weight, bias, activation, **options)

    monkeypatch.setattr(choosing, "choose", spy)
    fast, sparse = served()
    (first, fused, *sizes), (second, plain, *_) = seen
    assert sizes == [6, fast.report.layers[0]["nnz"]]
    assert (fused, plain) == ("relu", "none")
    torch.testing.assert_close(first, X)
    torch.testing.assert_close(second, F.relu(sparse.to_dense().layer(X)).detach() + 1)
    taken = kernel.registered()[fast.report.layers[0]["kernel"]]
    assert taken.pack_entries is not None
    assert taken.name not in kernel.ALL_TRAINING


def test_unmeasured_without_inputs():
    fast, _ = served(x=None)
    row = fast.report.layers[0]
    assert row["reason"].startswith("not measured: there are no example inputs; neither compared with dense")
    assert row["format"] == "csr"


def test_what_no_kernel_can_pack_keeps_that_of_training_and_its_activation(monkeypatch):
    entries = {
        name: entry
        for name, entry in kernel.registered().items()
        if entry.pack_entries is None or name in kernel.ALL_TRAINING
    }
    monkeypatch.setattr(kernel, "_REGISTRY", entries)
    fast, sparse = served()
    row = fast.report.layers[0]
    assert row["kernel"] == "cpu-csr-train"
    assert row["reason"].startswith("the kernel of training: ")
    assert "dense: it packs dense weights only" in row["reason"]
    torch.testing.assert_close(fast(X).detach(), sparse.eval()(X).detach())
