"""Which weights are stored compact, and the reason at every one that is not."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from fxsparse import Plan, choosing, compile, module
from fxsparse.errors import PlanError
from fxsparse.kernel import registered
from fxsparse.methods import gmp, gse, rigl, sr_ste
from fxsparse.passes import choose_storage
from fxsparse.pattern import NM, Block, Unstructured
from fxsparse.reparam import HardMask
from fxsparse.transposable import Transposable


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep, self.conv = nn.Conv3d(1, 4, 1), nn.Conv2d(1, 4, 3)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.read, self.free = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.conv(self.deep(x.unsqueeze(2))[:, :1, 0]).flatten(1)[:, :16]
        x = self.free(self.b(self.a(x)))
        return self.read(x) + self.read.weight.sum()


def storages(plan, model=None, x=None):
    sparse = compile(model or Net(), plan, example_inputs=x)
    return {row["name"]: (row["storage"], row["reason"]) for row in sparse.report.to_dict()["layers"]}


def test_compact_where_nothing_refuses_and_a_reason_everywhere_else():
    found = storages(Plan(sparsity=0.5, storage="compact"))
    assert found == {
        "deep.weight": ("masked", "no compact storage: there is no compact conv3d kernel"),
        "conv.weight": ("compact", "the plan asks for compact storage"),
        "a.weight": ("masked", "no compact storage: it is tied to b.weight"),
        "read.weight": ("masked", "no compact storage: something other than a linear op reads it"),
        "free.weight": ("compact", "the plan asks for compact storage"),
    }


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(sparsity=0.5, storage="compact", method=gmp()), "gmp keeps weights behind its zeros"),
        (Plan(pattern=NM(2, 4), storage="compact", method=sr_ste()), "sr_ste keeps weights behind its zeros"),
        (
            Plan(storage="compact", pattern=Transposable(), method=rigl()),
            "Transposable() chooses over the whole weight",
        ),
        (Plan(sparsity=0.5, storage="masked"), "the plan asks for masked storage"),
        (Plan(sparsity=0.5), "not measured: no example inputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_method_pattern_or_plan_rules_out(plan, reason):
    [(storage, why)] = storages(plan, nn.Linear(16, 16)).values()
    assert storage == "masked"
    assert reason in why


def test_on_cuda_linear_layers_train_with_the_kernel_for_it(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(choose_storage, "_device", lambda *_: torch.device("cuda"))
    sparse = compile(nn.Linear(16, 4), Plan(sparsity=0.5, storage="compact"))
    [row] = sparse.report.to_dict()["layers"]
    assert (row["kernel"], row["reason"]) == ("cuda-csr-train", "the plan asks for compact storage")
    assert sparse(torch.ones(2, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (Block(32, 16), "cuda-bsr-train"),
        (Block(64, 64), "cuda-bsr-train"),
        (Block(8, 32), "cuda-csr-train"),
        (Unstructured(), "cuda-csr-train"),
    ],
)
def test_on_cuda_blocks_that_tensor_cores_multiply_train_as_such(pattern, name, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(choose_storage, "_device", lambda *_: torch.device("cuda"))
    model = nn.Linear(128, 64)
    sparse = compile(model, Plan(sparsity=0.5, pattern=pattern, storage="compact"))
    [row] = sparse.report.to_dict()["layers"]
    assert (row["kernel"], row["reason"]) == (name, "the plan asks for compact storage")
    x = torch.randn(3, 128)
    torch.testing.assert_close(sparse(x), sparse.to_dense()(x))


def test_blocks_of_different_sides_are_measured_each_for_themselves(monkeypatch):
    seen = []

    def choose(problem, x, weight, bias=None, activation="none"):
        seen.append((problem, weight))
        return choosing.Choice(registered()["dense"], {}, {}, "not measured here")

    monkeypatch.setattr(choosing, "choose", choose)
    for pattern in (Block(16, 16), Block(64, 32), Block(4, 4)):
        plan = Plan(sparsity=0.5, pattern=pattern)
        compile(nn.Sequential(nn.Linear(64, 64)), plan, example_inputs=torch.randn(8, 64))
    assert [(problem.is_blocked, problem.side) for problem, _ in seen] == [
        (True, 16),
        (True, 32),
        (False, None),
    ]
    assert all(int(weight.count_nonzero()) == problem.nnz for problem, weight in seen)


def test_auto_takes_what_measured_faster_and_says_by_how_much():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 8))
    found = storages(Plan(sparsity=0.97, allocation="uniform"), model, torch.randn(256, 1024))
    storage, why = found["0.weight"]
    assert (storage, "x of dense" in why) == ("compact", True)
    assert all(" us" in why for _, why in found.values())


def test_auto_measures_convolutions_at_their_shapes():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 2, 1, stride=8), nn.Flatten(2))
    model.append(nn.Conv1d(2, 4, 1))
    found = storages(Plan(sparsity=0.97, allocation="uniform"), model, torch.randn(2, 64, 16, 16))
    storage, why = found["0.weight"]
    assert (storage, "x of dense-conv-masked" in why) == ("compact", True)
    assert all(" us" in why for _, why in found.values())


def test_a_method_with_a_changing_count_is_masked():
    assert HardMask().exact_zeros
    method = gmp()
    assert method.schedule is not None
    assert method.schedule.ramp is not None
    assert (
        "changes its count of nonzeros"
        in storages(Plan(sparsity=0.5, storage="compact", method=method), nn.Linear(8, 8))["weight"][1]
    )


def on_meta(build):
    with torch.device("meta"):
        return build()


COMPACT = Plan(sparsity=0.9, allocation="uniform", storage="compact", method=gse(scope="global"))
DRIFT = "no compact storage: gse ranks all weights together, so that their counts drift"


def test_a_weight_that_stays_dense_is_a_warning_among_the_notes():
    sparse = compile(nn.Linear(16, 32), COMPACT)
    warning = (
        "WARNING: the plan asks for compact storage, and these weights are dense under a mask: weight [32, 16], 2,048 "
        f"bytes ({DRIFT})"
    )
    assert warning in sparse.report.notes
    assert warning in str(sparse.report)
    assert pickle.loads(pickle.dumps(sparse)).report.notes.count(warning) == 1
    for plan in (replace(COMPACT, storage="auto"), replace(COMPACT, method=gse())):
        assert not any("WARNING" in note for note in compile(nn.Linear(16, 32), plan).report.notes)


@pytest.mark.parametrize("storage", ["compact", "auto"])
def test_a_model_on_meta_is_not_created_dense_unasked(storage):
    model = on_meta(lambda: nn.Sequential(nn.Linear(50_000, 50_000), nn.Linear(50_000, 8)))
    with pytest.raises(PlanError, match=r"2 of its weights would be dense.*10,001,600,000 bytes") as error:
        compile(model, replace(COMPACT, storage=storage))
    assert f"0.weight [50000, 50000], 10,000,000,000 bytes ({DRIFT}); 1.weight [8, 50000]" in str(error.value)


def test_the_limit_holds_for_what_is_on_meta_together(monkeypatch):
    build = lambda: nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))  # noqa: E731
    monkeypatch.setattr(module, "MAX_DENSE_BYTES", 2 * 2048)
    assert any("WARNING" in note for note in compile(on_meta(build), COMPACT).report.notes)
    monkeypatch.setattr(module, "MAX_DENSE_BYTES", 2 * 2048 - 1)
    with pytest.raises(PlanError, match=r"4,096 bytes, more than 4,095"):
        compile(on_meta(build), COMPACT)
    compile(build(), COMPACT)
    compile(on_meta(build), replace(COMPACT, storage="masked"))


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(25))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if float(x.sum()) < 1e9 else x
        return x


def test_many_weights_are_counted_and_the_module_walk_is_a_reason():
    [warning] = [
        note for note in compile(Opaque(), replace(COMPACT, method=gse())).report.notes if "WARNING" in note
    ]
    assert warning.endswith("; and 5 more")
    assert "the module walk does not see who else reads it" in warning
