"""GSE in training: both storages, every tier of state, and no dense tensor in compact storage."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.flops.training import train_flops
from fxsparse.kernels import cpu
from fxsparse.method import from_dict
from fxsparse.methods import gse, rigl
from fxsparse.pattern import NM
from fxsparse.storage import CompactWeight
from fxsparse.testing import forbid_tensors_of

SAMPLINGS = ["uniform", "grabo", "graest"]


def moving(**options):
    return gse(every=2, stop=10_000, **{"drop_fraction": 0.4, **options})


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).to(
        dtype
    )


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def build(method, storage="compact", optimizer="sgd", model=None, **options):
    plan = Plan(sparsity=0.8, allocation="er_unrolled", storage=storage, method=method, **options)
    sparse = fxsparse.compile(net() if model is None else model, plan)
    made = OPTIMIZERS[optimizer](sparse.parameters())
    sparse.attach(made)
    return sparse, made


def step(sparse, optimizer, at, micro_batches=1, dtype=torch.float64):
    optimizer.zero_grad()
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at), dtype=dtype)
    for part in x.chunk(micro_batches):
        (sparse(part).square().mean() / micro_batches).backward()
    optimizer.step()


def equal_masks(one, other):
    return all(torch.equal(mask, other.masks()[name]) for name, mask in one.masks().items())


def test_defaults_are_the_papers():
    schedule = gse().schedule
    updates = schedule.updates(200 * 390)
    assert (updates[0], updates[-1], len(updates)) == (1000, 46_000, 46)
    assert schedule.skip_step
    assert schedule.drop_fraction(0) == 0.2
    assert schedule.drop_fraction(23_400) == pytest.approx(0.1)
    assert not gse(variant="torch").schedule.skip_step
    assert gse(scope="global").is_joint
    assert not gse().is_joint


def test_plans_allocate_by_er_on_the_unrolled_matrix():
    assert Plan(sparsity=0.95, method=gse()) == Plan.preset("gse-95")
    for allocation in ("erk", "er_unrolled", "uniform"):
        plan = Plan(sparsity=0.95, method=gse(), allocation=allocation)
        assert Plan.from_dict(plan.to_dict()).allocation == allocation
    plan = Plan.preset("gse-95")
    assert "allocation" not in plan.to_dict()
    assert (plan.sparsity, plan.method, plan.allocation) == (0.95, gse(), "er_unrolled")
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.preset("rigl-95").allocation == "erk"
    method = gse(gamma=0.5, sampling="graest", scope="global", variant="torch", weight_init="keep")
    assert from_dict(method.to_dict()) == method


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "repo"}, "expected variant as one of paper, torch, got 'repo'"),
        ({"sampling": "gradient"}, "expected sampling as one of uniform, grabo, graest"),
        ({"scope": "model"}, "expected scope as one of layer, global"),
        ({"gamma": 0}, "expected gamma as a number above 0, got 0"),
        ({"gamma": float("inf")}, "expected gamma as a number above 0, got inf"),
        ({"weight_init": "he"}, "expected weight_init as one of"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(PlanError, match=message):
        gse(**options)


def test_another_pattern_is_refused():
    with pytest.raises(PlanError, match="gse"):
        Plan(method=gse(), pattern=NM(2, 4))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("variant", ["paper", "torch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_storages_make_the_same_choices(sampling, variant, optimizer):
    method = moving(sampling=sampling, variant=variant)
    (masked, first), (compact, second) = (
        build(method, "masked", optimizer),
        build(method, "compact", optimizer),
    )
    assert all(isinstance(weight, CompactWeight) for _, weight in compact.weights())
    start = masked.masks()
    for at in range(40):
        step(masked, first, at, 1 + at % 3)
        step(compact, second, at, 1 + at % 3)
        assert equal_masks(masked, compact)
    for name, weight in masked.dense_state_dict().items():
        torch.testing.assert_close(weight, compact.dense_state_dict()[name], rtol=1e-9, atol=1e-12)
    assert all(not torch.equal(mask, start[name]) for name, mask in masked.masks().items())


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_counts_stay_and_what_is_grown_starts_at_zero_with_zero_state(storage, optimizer):
    sparse, made = build(moving(sampling="grabo", variant="torch"), storage, optimizer)
    counts = {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    for at in range(21):
        before, weights = sparse.masks(), sparse.dense_state_dict()
        step(sparse, made, at)
        after = sparse.masks()
        assert {name: int(mask.sum()) for name, mask in after.items()} == counts
        for name, weight in sparse.weights():
            grown = after[name] & ~before[name]
            assert not sparse.dense_state_dict()[name][grown].any()
            assert not weights[name][grown].any()
            assert bool(grown.any()) is (at % 2 == 1)
            trained = weight.values if storage == "compact" else weight.parameter
            for state in made.state[trained].values():
                if state.shape == trained.shape:
                    at_mask = grown if storage == "masked" else grown[after[name]]
                    assert not state[at_mask].any()
                    assert state[~at_mask].any()


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_batch_is_for_exploration_only_in_the_papers_variant(storage):
    sparse, optimizer = build(moving(), storage)
    for at in range(6):
        bias = sparse.state_dict()["0.bias"].clone()
        step(sparse, optimizer, at)
        assert torch.equal(sparse.state_dict()["0.bias"], bias) is (at in (2, 4))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_run_resumes_bit_for_bit(sampling, storage):
    sparse, optimizer = build(moving(sampling=sampling), storage)
    for at in range(5):
        step(sparse, optimizer, at)
    resumed, again = build(moving(sampling=sampling), storage)
    resumed.load_state_dict(copy.deepcopy(sparse.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for at in range(5, 15):
        step(sparse, optimizer, at)
        step(resumed, again, at)
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_global_scope_keeps_the_total_and_lets_layers_drift():
    sparse, optimizer = build(moving(scope="global"), "masked")
    names = [node.name for node in sparse.update_graph.graph.nodes if node.op == "call_function"]
    assert names == [
        "propose",
        "propose_1",
        "propose_2",
        "choose_together",
        "move_mask",
        "move_mask_1",
        "move_mask_2",
    ]
    counts = {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    for at in range(21):
        step(sparse, optimizer, at)
    drifted = {name: int(mask.sum()) for name, mask in sparse.masks().items()}
    assert sum(drifted.values()) == sum(counts.values())
    assert drifted != counts
    resumed, _ = build(moving(scope="global"), "masked")
    resumed.load_state_dict(sparse.state_dict())
    assert equal_masks(sparse, resumed)


def test_global_scope_cannot_be_compact():
    sparse, _ = build(moving(scope="global"), "compact")
    assert {row["storage"] for row in sparse.report.layers} == {"masked"}
    assert "gse ranks all weights together, so that their counts drift" in sparse.report.layers[0]["reason"]


def test_a_frozen_weight_and_one_outside_the_loss_keep_their_masks():
    for scope in ("layer", "global"):
        model = net()
        model[0].weight.requires_grad_(False)
        sparse, optimizer = build(moving(scope=scope), "masked", model=model)
        start = sparse.masks()
        for at in range(7):
            step(sparse, optimizer, at)
        assert torch.equal(sparse.masks()["0.weight"], start["0.weight"])
        assert not torch.equal(sparse.masks()["2.weight"], start["2.weight"])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_convolutions_train_in_masked_storage(sampling):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, stride=2),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    sparse, optimizer = build(moving(sampling=sampling), "masked", model=model)
    start = sparse.masks()
    for _ in range(7):
        optimizer.zero_grad()
        sparse(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    for name, mask in sparse.masks().items():
        assert not torch.equal(mask, start[name])
        assert int(mask.sum()) == int(start[name].sum())


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(cpu.availability() is not None, reason="in plain PyTorch products gather [tokens, nnz]")
def test_no_tensor_of_dense_size_in_compact_training_and_updates(sampling, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).to(dtype)
    sparse, optimizer = build(moving(sampling=sampling), "compact", "adamw", model)
    assert all(isinstance(weight, CompactWeight) for _, weight in sparse.weights())
    largest = max(weight.values.numel() for _, weight in sparse.weights())
    start = sparse.masks()
    with forbid_tensors_of(256 * 256):
        for at in range(5):
            if at == 3:
                with sparse.exploring():
                    sparse(torch.randn(8, 256, dtype=dtype)).square().mean().backward()
            optimizer.zero_grad()
            sparse(torch.randn(8, 256, dtype=dtype)).square().mean().backward()
            optimizer.step()
        state = sparse.state_dict()
        sparse.load_state_dict(state)
    assert largest < 256 * 256 / 4
    assert any(not torch.equal(mask, start[name]) for name, mask in sparse.masks().items())
    with pytest.raises(AssertionError, match="are forbidden"), forbid_tensors_of(256 * 256):
        sparse.masks()


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_initial_weights_give_unit_variance(storage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 600))
    sparse, _ = build(gse(), storage, model=model)
    mask, weight = sparse.masks()["0.weight"], sparse.dense_state_dict()["0.weight"]
    fan_in = mask.sum(1).float()
    assert (weight.abs().amax(1) <= (3 / fan_in).sqrt() + 1e-6).all()
    assert float((weight.square().sum(1)).mean()) == pytest.approx(1.0, rel=0.05)
    kept, _ = build(gse(weight_init="keep"), storage, model=nn.Sequential(nn.Linear(400, 600)))
    assert kept.dense_state_dict()["0.weight"].abs().max() <= 1 / 20


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_two_frames_over_many_updates(storage):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    (sparse, optimizer), (plain, other) = (build(moving(sampling="grabo"), storage) for _ in range(2))
    call = torch.compile(sparse, backend=counter, fullgraph=True)
    for at in range(40):
        for model, one in ((call, optimizer), (plain, other)):
            step(model, one, at)
    assert counter.frame_count <= 2
    assert equal_masks(sparse, plain)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_training_flops_are_the_papers_formula(gamma):
    sparse, dense, every = 200, 1000, 99

    def forward(counts):
        return 10 * counts["w"]

    found = train_flops(gse(every=every, stop=1000, gamma=gamma), forward, {"w": 20}, {"w": 100})
    expected = (3 * sparse * every + 2 * sparse + (1 + gamma) * sparse) / (every + 1)
    assert found == pytest.approx(expected, rel=1e-12)
    baseline = train_flops(rigl(every=every), forward, {"w": 20}, {"w": 100})
    assert baseline == pytest.approx((3 * sparse * every + 2 * sparse + dense) / (every + 1), rel=1e-12)
    step_too = train_flops(gse(every=every, gamma=gamma, variant="torch"), forward, {"w": 20}, {"w": 100})
    assert step_too == pytest.approx(3 * sparse + Fraction(gamma) * sparse / every)
