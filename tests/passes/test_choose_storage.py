"""Which weights are stored compact, and the reason at every one that is not."""

import pytest
import torch
from torch import nn

from fxsparse import Plan, compile
from fxsparse.methods import gmp, rigl, sr_ste
from fxsparse.pattern import NM, Block
from fxsparse.reparam import HardMask


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
            Plan(sparsity=0.5, storage="compact", pattern=Block(4, 4), method=rigl()),
            "Block(rows=4, cols=4) chooses over the whole weight",
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
