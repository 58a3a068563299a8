"""What every method keeps while a real model trains: counts, state, checkpoints, folding, two frames."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxsparse
from fxsparse import Override, Plan
from fxsparse.knapsack import KeepLargest
from fxsparse.method import GlobalRule
from fxsparse.methods import (
    METHODS,
    acdc,
    chase,
    cht,
    dsr,
    dtp,
    dual_averaging,
    feather,
    gmp,
    granet,
    gse,
    hypersparse,
    imp,
    mest,
    movement,
    mst,
    rigl,
    s_ste,
    set_,
    snfs,
    soft_movement,
    spartan,
    sr_ste,
    srigl,
    static,
    str_,
    supermask,
    top_kast,
)
from fxsparse.plans import fixed_sparsity
from fxsparse.storage import MaskedWeight

STEPS = 16
SHORT = {
    "static": static(),
    "set": set_(every=2),
    "rigl": rigl(every=3, stop=100),
    "srigl": srigl(every=3, stop=100),
    "gse": gse(every=3, stop=100),
    "gmp": gmp(start=2, stop=10, every=2),
    "sr_ste": sr_ste(),
    "spartan": spartan(steps=STEPS),
    "dual_averaging": dual_averaging(steps=STEPS),
    "imp": imp(steps=STEPS),
    "acdc": acdc(steps=STEPS, compress=(0.2, 0.7), decompress=(0.45,)),
    "granet": granet(every=2, ramp=10, stop=STEPS),
    "feather": feather(steps=STEPS),
    "top_kast": top_kast(every=3),
    "str": str_(initial=-3.0, weight_decay=0.01),
    "movement": movement(steps=STEPS, warmup=2, cooldown=4),
    "mest": mest(steps=STEPS, every=2, exchange=(0.3, 0.1), phases=(0.5,)),
    "snfs": snfs(every=2, stop=STEPS),
    "dsr": dsr(every=2, exchange=0.3, threshold=0.01),
    "s_ste": s_ste(mvue=True),
    "hypersparse": hypersparse(cut=9, start=2, epoch=2, strength=0.01),
    "cht": cht(every=2, steps=STEPS),
    "chase": chase(every=2, stop=STEPS, channel_every=2, channel_stop=10),
    "soft_movement": soft_movement(steps=STEPS, warmup=2, cooldown=4, score_lr=20.0),
    "dtp": dtp(eps=0.5, score_lr=3.0),
    "supermask": supermask(score_lr=10.0),
    "mst": mst((0.5, 0.9), (2, 6), restore=10, stop=14, every=2),
}
"""Every exported method on a schedule that moves its masks within `STEPS`."""
BATCHES = [torch.randn(12, 16, generator=torch.Generator().manual_seed(at)) for at in range(STEPS)]


def model():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def build(method, sparsity=0.8, frozen=(), **wish):
    torch.manual_seed(0)
    user = model()
    for name in frozen:
        user.get_parameter(name).requires_grad_(False)
    sparsity = sparsity if method.pattern is None else fixed_sparsity(method.pattern) or sparsity
    sparse = fxsparse.compile(user, Plan(sparsity=sparsity, storage="masked", method=method, **wish))
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.05, weight_decay=1e-3), momentum=0.9)
    sparse.attach(optimizer)
    return sparse, optimizer


def step(sparse, optimizer, at, call=None):
    optimizer.zero_grad()
    ((sparse if call is None else call)(BATCHES[at]) - 1).square().mean().backward()
    optimizer.step()


def total(sparse):
    return sum(int(mask.sum()) for mask in sparse.masks().values())


def test_every_exported_method_trains_here():
    assert {build().name for build in METHODS if build().one_shot is None} == set(SHORT)


@pytest.mark.parametrize("method", SHORT.values(), ids=SHORT)
def test_a_run_ends_on_its_count_and_goes_on_from_any_step_bit_for_bit(method, tmp_path):
    """The checkpoint is taken at step 7, in the middle of every ramp and phase, and pickled with the module."""
    sparse, optimizer = build(method)
    for at in range(7):
        step(sparse, optimizer, at)
    saved = copy.deepcopy((sparse.state_dict(), optimizer.state_dict()))
    resumed, again = build(method)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for at in range(7, STEPS):
        step(sparse, optimizer, at)
        step(resumed, again, at)
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    if not method.learned_nnz and not method.varying_nnz:
        assert total(sparse) == sum(row["nnz"] for row in sparse.report.layers)
    fxsparse.save(sparse, tmp_path / "run.safetensors", optimizer=optimizer)
    user = model()
    made = torch.optim.SGD(user.parameters(), lr=0.05, momentum=0.9)
    loaded = fxsparse.load(tmp_path / "run.safetensors", user, optimizer=made)
    for run in ((sparse, optimizer), (loaded, made)):
        step(*run, 0)
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    twin = pickle.loads(pickle.dumps(sparse))
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize("method", SHORT.values(), ids=SHORT)
def test_what_is_folded_is_what_the_module_computes(method):
    sparse, optimizer = build(method)
    user_keys = set(model().state_dict())
    for at in range(9):
        step(sparse, optimizer, at)
    expected = sparse.eval()(BATCHES[0]).detach()
    assert set(sparse.dense_state_dict()) == user_keys
    torch.testing.assert_close(sparse.to_dense()(BATCHES[0]).detach(), expected)
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=BATCHES[0])
    torch.testing.assert_close(fast(BATCHES[0]), expected, rtol=1e-4, atol=1e-5)
    masks = sparse.masks()
    for name, weight in sparse.dense_state_dict(["0.weight", "2.weight"]).items():
        assert not weight[~masks[name]].any()


@pytest.mark.parametrize("method", SHORT.values(), ids=SHORT)
def test_state_of_entries_follows_the_mask(method):
    """Where pruned entries are 0 in storage their optimizer state is too, unless the method says that it stays."""
    sparse, optimizer = build(method)
    for at in range(9):
        step(sparse, optimizer, at)
        for _, weight in sparse.weights():
            assert isinstance(weight, MaskedWeight)
            if not method.reparam.exact_zeros:
                continue
            assert not weight.parameter[~weight.mask].any()
            if not method.keeps_state:
                state = optimizer.state[weight.parameter].get("momentum_buffer")
                assert state is None or not state[~weight.mask].any()


KEEPS_DENSE = {name: method for name, method in SHORT.items() if name != "s_ste"}
"""All but one that has no dense weights, and says so: `test_s_ste.py`."""


DENSE = {
    "override": {"overrides": (Override("2", sparsity=0),)},
    "table": {"allocation": {"0": 0.8, "2": 0.0}},
}


def takes_tables(method):
    """Where all weights share one budget the plan takes none."""
    return not isinstance(method.rule, GlobalRule | KeepLargest) or getattr(method.rule, "own_counts", False)


@pytest.mark.parametrize(
    ("method", "wish"),
    [
        pytest.param(method, wish, id=f"{name}-{where}")
        for name, method in KEEPS_DENSE.items()
        for where, wish in DENSE.items()
        if where == "override" or takes_tables(method)
    ],
)
def test_a_weight_that_the_plan_keeps_dense_trains_dense_at_every_step(method, wish):
    sparse, optimizer = build(method, **wish)
    kept = sparse.get_parameter("2.weight")
    start = kept.detach().clone()
    for at in range(STEPS):
        step(sparse, optimizer, at)
        assert sparse.masks().get("2.weight", torch.tensor(True)).all()
        assert kept.all()
        torch.testing.assert_close(sparse.dense_state_dict()["2.weight"], kept.detach())
    assert (kept != start).any()
    rows = {row["name"]: row["nnz"] for row in sparse.report.layers}
    left_out = {row["name"]: row["reason"] for row in sparse.report.untouched}.get("2.weight")
    if left_out is None:
        assert rows["2.weight"] == kept.numel()
    else:
        assert left_out == f"the plan keeps it dense, and {method.name} would not"
        assert set(sparse.masks()) == set(rows) == {"0.weight"}
    twin = pickle.loads(pickle.dumps(sparse))
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


@pytest.mark.parametrize(
    "method", [pytest.param(m, id=n) for n, m in SHORT.items() if not m.learned_nnz and not m.varying_nnz]
)
def test_a_frozen_weight_is_cut_to_its_share_so_that_the_total_is_the_plans(method):
    sparse, optimizer = build(method, frozen=("0.weight",))
    weight, start = sparse.get_parameter("0.weight"), sparse.masks()["0.weight"]
    values = weight.detach().clone()
    for at in range(STEPS):
        step(sparse, optimizer, at)
        if not isinstance(method.rule, KeepLargest) and not any(extra.learned for extra in method.extras):
            assert torch.equal(sparse.masks()["0.weight"], start), (
                "nothing moves a mask that no gradient tells of"
            )
    rows = {row["name"]: row["nnz"] for row in sparse.report.layers}
    if not isinstance(method.rule, KeepLargest | GlobalRule):
        assert {name: int(mask.sum()) for name, mask in sparse.masks().items()} == rows
    assert total(sparse) == sum(rows.values())
    assert torch.equal(weight, values)


TESTED_THERE = ("static", "set", "rigl", "srigl", "gse", "gmp", "sr_ste", "spartan", "dual_averaging", "imp")
"""Methods whose graphs under torch.compile have tests of their own."""


@pytest.mark.parametrize("name", [name for name in SHORT if name not in TESTED_THERE])
def test_two_frames_at_most_and_the_same_run(name):
    method = SHORT[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    (sparse, optimizer), (plain, other) = build(method), build(method)
    call = torch.compile(sparse, backend=counter, fullgraph=True)
    for at in range(STEPS):
        step(sparse, optimizer, at, call)
        step(plain, other, at)
    assert counter.frame_count <= 2
    assert total(sparse) == total(plain)
