"""SRigL as a method: published counts, what training keeps true, and what the published codes got wrong."""

import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.ablation import AblateAndGrow
from fxsparse.demo.digits import accuracy, load_digits
from fxsparse.demo.digits import train as train_on_digits
from fxsparse.errors import PlanError
from fxsparse.method import Probe
from fxsparse.methods import srigl, srigl_fan_in
from fxsparse.pattern import NM, ConstantFanIn, Unstructured

# srigl_rigl 3.2: fan-ins of ResNet-50 with ERK at 99 %, in parameter order.
RESNET50_99 = [
    6, 9, 10, 6, 6, 24, 10, 6, 24, 10, 6, 14, 9, 6, 7, 24, 9, 6, 24, 9, 6, 24, 9, 6, 14, 9, 6, 7, 24, 9, 6, 24, 9, 6,
    24, 9, 6, 24, 9, 6, 24, 9, 6, 14, 9, 6, 7, 24, 9, 6, 24, 9, 6, 14,
]  # fmt: skip


def on_meta(build, **options):
    with torch.device("meta"):
        return build(**options)


@pytest.mark.parametrize(
    ("sparsity", "nnz"), [(0.99, 246_512), (0.95, 1_262_224), (0.9, 2_544_096), (0.8, 5_086_360)]
)
def test_initial_nonzeros_of_resnet50(sparsity, nnz):
    model = on_meta(torchvision.models.resnet50)
    counts = fxsparse.allocate(model, Plan(sparsity=sparsity, method=srigl()))
    assert sum(counts.values()) == nnz
    if sparsity == 0.99:
        assert [n // len(model.get_parameter(name)) for name, n in counts.items()] == RESNET50_99


@pytest.mark.parametrize(
    ("sparsity", "nnz", "fan_ins"), [(0.8, 17_209_512, (153, 614)), (0.9, 8_567_008, (76, 307))]
)
def test_initial_nonzeros_of_vit_b_16(sparsity, nnz, fan_ins):
    model = on_meta(torchvision.models.vit_b_16)
    counts = fxsparse.allocate(model, Plan(sparsity=sparsity, allocation="uniform", method=srigl()))
    weights = {name: model.get_parameter(name) for name in counts}
    assert (len(counts), sum(w.numel() for w in weights.values())) == (50, 86_292_480)
    assert sum(counts.values()) == nnz
    found = {(w[0].numel(), counts[name] // len(w)) for name, w in weights.items()}
    assert found == set(zip((768, 3072), fan_ins, strict=True))


def test_initial_fan_ins_of_cifar_resnet18():
    model = on_meta(torchvision.models.resnet18, num_classes=10)
    model.conv1 = on_meta(lambda: nn.Conv2d(3, 64, 3, bias=False))
    counts = fxsparse.allocate(model, Plan(sparsity=0.9, method=srigl()))
    fan_ins = [n // len(model.get_parameter(name)) for name, n in counts.items()]
    expected = [27, *[276] * 4, 204, 270, 64, 270, 270, 201, 267, 128, 267, 267, 199, 265, 198, 265, 265, 512]
    assert sorted(fan_ins) == sorted(expected)


def test_the_defaults_are_the_papers():
    method = srigl()
    assert method.schedule is not None
    updates = method.schedule.updates(32_000)
    assert (updates[0], updates[-1], method.schedule.skip_step) == (100, 24_900, False)
    assert [method.schedule.drop_fraction(step) for step in (0, 12_500)] == [0.3, 0.15]
    assert method.rule == AblateAndGrow(gamma_sal=0.3)
    assert method.rule is not None
    assert method.rule.probe is Probe.DENSE
    assert srigl(preset="srigl_repo", gamma_sal=0.95).rule == AblateAndGrow(0.95, authors_code=True)


def test_the_pattern_is_constant_fan_in_and_no_other():
    assert Plan(sparsity=0.9, method=srigl()).pattern == ConstantFanIn()
    assert Plan(sparsity=0.9, method=srigl(), pattern=ConstantFanIn(4)).pattern == ConstantFanIn(4)
    for options in ({"pattern": Unstructured()}, {"overrides": (Override("0", pattern=NM(2, 4)),)}):
        with pytest.raises(PlanError, match="srigl trains ConstantFanIn only, got"):
            Plan(sparsity=0.9, method=srigl(), **options)


def test_a_preset_by_its_name():
    plan = Plan.preset("srigl-90")
    assert (plan.sparsity, plan.method, plan.pattern) == (0.9, srigl(), ConstantFanIn())


def test_plans_survive_their_file(tmp_path):
    method = srigl(
        gamma_sal=0.95, never_ablate=("head", "blocks.0.*"), preset="srigl_repo", weight_init="keep"
    )
    plan = Plan(sparsity=0.9, method=method)
    plan.save(tmp_path / "plan.toml")
    assert Plan.load(tmp_path / "plan.toml") == plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"never_ablate": "head"},
            r"expected never_ablate as a list of globs such as \['head'\], got 'head'",
        ),
        ({"never_ablate": 3}, r"expected never_ablate as a list of globs such as \['head'\], got 3"),
        ({"ablate": None}, "expected ablate as True or False, got None"),
        ({"gamma_sal": 0.0}, "ablate=False keeps every neuron"),
        ({"gamma_sal": 1.5}, "or a whole number from 1 on, got 1.5"),
        ({"preset": "paper"}, "expected preset as one of srigl_paper, srigl_repo, got 'paper'"),
        ({"weight_init": "he"}, "expected weight_init as one of"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        srigl(**options)


class Mixed(nn.Module):
    """A convolution, a grouped one, a packed attention projection, and linears with and without bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 3, groups=4)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.hidden = nn.Linear(32, 40, bias=False)
        self.head = nn.Linear(40, 5)

    def forward(self, x):
        x = self.grouped(torch.relu(self.norm(self.conv(x)))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.relu(self.hidden(x.mean(1))))


def images(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(5, (8,), generator=generator)


ADAMW = {"lr": 0.01, "weight_decay": 0.1}


def fast(**options):
    return srigl(**({"every": 2, "stop": 10_000, "decay": "constant"} | options))


def trained(
    method, model=None, steps=30, storage="masked", sparsity=0.9, optimizer=torch.optim.AdamW, batch=images
):
    torch.manual_seed(0)
    sparse = fxsparse.compile(
        Mixed() if model is None else model, Plan(sparsity=sparsity, method=method, storage=storage)
    )
    held = optimizer(sparse.parameters(), **(ADAMW if optimizer is torch.optim.AdamW else {"lr": 0.1}))
    sparse.attach(held)
    return sparse, held, train(sparse, held, range(steps), batch)


def train(sparse, optimizer, steps, batch=images):
    """Masks after every step."""
    history = []
    for step in steps:
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(sparse(x), y).backward()
        optimizer.step()
        history.append(sparse.masks())
    return history


def storages(sparse):
    return {row["storage"] for row in sparse.report.to_dict()["layers"]}


def fan_ins(mask):
    return mask.reshape(len(mask), -1).sum(1)


def budgets(sparse):
    return {name: target.budget for name, target in sparse._emitted.targets.items()}


@pytest.mark.parametrize("preset", ["srigl_paper", "srigl_repo"])
def test_every_layer_shares_its_budget_among_the_neurons_left(preset):
    sparse, _, history = trained(fast(gamma_sal=0.95, preset=preset))
    ablated = 0
    for name, budget in budgets(sparse).items():
        for masks in history:
            counts = fan_ins(masks[name])
            left = int((counts > 0).sum())
            assert set(counts[counts > 0].tolist()) == {srigl_fan_in(budget, left, masks[name][0].numel())}
            assert int(counts.sum()) <= budget
        ablated += left < len(counts)
        assert name != "head.weight" or left == 5
    assert set(budgets(sparse)) == {
        *("conv.weight", "grouped.weight", "attention.in_proj_weight", "attention.out_proj.weight"),
        *("hidden.weight", "head.weight"),
    }
    assert ablated >= 2


def test_without_ablation_every_neuron_keeps_the_initial_fan_in():
    sparse, _, history = trained(fast(ablate=False, gamma_sal=0.95))
    for name, mask in history[-1].items():
        assert set(fan_ins(mask).tolist()) == {budgets(sparse)[name] // len(mask)}
        assert not torch.equal(mask, history[0][name])


def test_a_given_fan_in_is_kept_through_training():
    torch.manual_seed(0)
    plan = Plan(
        sparsity=0.9, method=fast(gamma_sal=0.95), overrides=(Override("hidden", pattern=ConstantFanIn(3)),)
    )
    sparse = fxsparse.compile(Mixed(), replace(plan, storage="masked"))
    optimizer = torch.optim.AdamW(sparse.parameters(), **ADAMW)
    sparse.attach(optimizer)
    history = train(sparse, optimizer, range(20))
    assert set(fan_ins(history[-1]["hidden.weight"]).tolist()) == {3}
    assert not torch.equal(history[-1]["hidden.weight"], history[0]["hidden.weight"])


def test_gamma_matters():
    masks = [trained(fast(gamma_sal=gamma), sparsity=0.8)[2][-1] for gamma in (0.3, 0.5, 0.95)]
    for one, other in ((0, 1), (1, 2)):
        assert any(not torch.equal(masks[one][name], masks[other][name]) for name in masks[0])


def test_updates_follow_every_step_of_the_default_schedule():
    _, _, history = trained(srigl(every=5, stop=16, decay="constant"), steps=18)
    moved = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in itertools.pairwise(history)
    ]
    assert [step + 2 for step, did in enumerate(moved) if did] == [5, 10, 15]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_grown_weights_start_at_zero_without_state_and_nothing_is_left_behind_a_mask(optimizer):
    sparse, held, history = trained(fast(gamma_sal=0.95, every=5), steps=9, optimizer=optimizer)
    before = history[-1]
    after = train(sparse, held, [9])[-1]
    for name, mask in after.items():
        weight = sparse.get_parameter(name)
        grown, kept = mask & ~before[name], mask & before[name]
        assert name == "conv.weight" or grown.any()
        assert not weight[grown].any()
        assert not weight[~mask].any()
        assert weight[kept].any()
        for state in held.state[weight].values():
            if state.shape == mask.shape:
                assert not state[grown].any()
                assert not state[~mask].any()


def test_an_entry_that_is_dropped_and_grown_again_keeps_its_value_and_state():
    # Everything is dropped, and where gradients repeat what was pruned before is no better: some are taken again.
    sparse, held, history = trained(fast(every=4, drop_fraction=1.0, ablate=False), steps=3, sparsity=0.3)
    before = history[-1]["hidden.weight"]
    other = copy.deepcopy(sparse)
    twin = torch.optim.AdamW(other.parameters(), **ADAMW)
    twin.load_state_dict(copy.deepcopy(held.state_dict()))
    train(other, twin, [3])  # not attached: no update comes
    after = train(sparse, held, [3])[-1]["hidden.weight"]
    again = before & after
    assert again.any()
    assert not torch.equal(before, after)
    weight, reference = sparse.get_parameter("hidden.weight"), other.get_parameter("hidden.weight")
    assert torch.equal(weight[again], reference[again])
    assert torch.equal(held.state[weight]["exp_avg"][again], twin.state[reference]["exp_avg"][again])


@pytest.mark.parametrize(
    ("preset", "weight_init", "deviation"),
    [("srigl_paper", None, 0.5), ("srigl_repo", None, 0.25), ("srigl_repo", "grad_flow", 0.5)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_initial_weights_have_the_variance_of_their_fan_in(preset, weight_init, deviation, transposed):
    from transformers.pytorch_utils import Conv1D

    wide = Conv1D(2000, 400) if transposed else nn.Linear(400, 2000)
    model = nn.Sequential(wide, nn.ReLU(), nn.Linear(2000, 10))
    method = srigl(preset=preset, weight_init=weight_init)
    plan = Plan(sparsity=0.98, allocation="uniform", method=method, storage="masked")  # a fan-in of 8
    weight = fxsparse.compile(model, plan).get_parameter("0.weight").detach()
    values = weight[weight != 0]
    assert len(values) == 16_000
    assert values.std() == pytest.approx(deviation, rel=0.02)


def test_weights_are_drawn_anew_once_with_a_note_and_may_be_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    given = copy.deepcopy(model)
    for storage in ("masked", "compact"):
        plan = Plan(sparsity=0.8, method=srigl(weight_init="keep"), storage=storage)
        kept = fxsparse.compile(copy.deepcopy(model), plan)
        mask = kept.masks()["0.weight"]
        assert torch.equal(kept.dense_state_dict()["0.weight"], given.get_parameter("0.weight") * mask)
    drawn = {}
    for storage in ("masked", "compact"):
        sparse = fxsparse.compile(copy.deepcopy(model), Plan(sparsity=0.8, method=srigl(), storage=storage))
        notes = [note for row in sparse.report.to_dict()["passes"] for note in row["notes"]]
        assert (
            sum("the values of 2 selected weights were drawn anew, as srigl does" in note for note in notes)
            == 1
        )
        drawn[storage] = sparse.dense_state_dict()
        assert torch.equal(drawn[storage]["0.bias"], given.get_parameter("0.bias"))
        assert not (drawn[storage]["0.weight"] == given.get_parameter("0.weight"))[
            sparse.masks()["0.weight"]
        ].any()
    assert all(torch.equal(drawn["masked"][key], drawn["compact"][key]) for key in drawn["masked"])


def test_a_frozen_weight_keeps_its_values():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    model.get_parameter("0.weight").requires_grad_(False)
    given = model.get_parameter("0.weight").clone()
    sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=srigl(), storage="masked"))
    assert torch.equal(sparse.get_parameter("0.weight"), given * sparse.masks()["0.weight"])


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_resumed_run_continues_bit_for_bit(storage):
    straight, _, history = trained(fast(gamma_sal=0.95), steps=24, storage=storage)
    half, held, _ = trained(fast(gamma_sal=0.95), steps=12, storage=storage)
    assert storages(half) >= {storage}
    saved = io.BytesIO()
    torch.save((half.state_dict(), held.state_dict()), saved)
    saved.seek(0)
    state, moments = torch.load(saved, weights_only=True)
    assert any((fan_ins(mask) == 0).any() for mask in half.masks().values())
    torch.manual_seed(1)  # other weights and another start
    sparse = fxsparse.compile(Mixed(), Plan(sparsity=0.9, method=fast(gamma_sal=0.95), storage=storage))
    sparse.load_state_dict(state)
    optimizer = torch.optim.AdamW(sparse.parameters(), **ADAMW)
    optimizer.load_state_dict(moments)
    sparse.attach(optimizer)
    resumed = train(sparse, optimizer, range(12, 24))[-1]
    assert all(torch.equal(mask, resumed[name]) for name, mask in history[-1].items())
    now = sparse.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in straight.state_dict().items())


def vectors(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(8, (12,), generator=generator)


@pytest.mark.parametrize("preset", ["srigl_paper", "srigl_repo"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_compact_storage_picks_exactly_what_masked_storage_picks(micro_batches, preset):
    histories = []
    for storage in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 8)
        ).double()
        method = fast(gamma_sal=0.95, preset=preset)
        sparse = fxsparse.compile(model, Plan(sparsity=0.8, method=method, storage=storage))
        assert storages(sparse) == {storage}
        optimizer = torch.optim.AdamW(sparse.parameters(), **ADAMW)
        sparse.attach(optimizer)
        histories.append([])
        for step in range(70):
            optimizer.zero_grad()
            for x, y in zip(*(part.chunk(micro_batches) for part in vectors(step)), strict=True):
                nn.functional.cross_entropy(sparse(x), y).backward()
            optimizer.step()
            histories[-1].append(sparse.masks())
    for masked, compact in zip(*histories, strict=True):
        assert all(torch.equal(mask, compact[name]) for name, mask in masked.items())
    counts = {int(masks["0.weight"].sum()) for masks in histories[0]}
    assert len(counts) > 3  # the count of nonzeros really varies
    assert (fan_ins(histories[0][-1]["0.weight"]) == 0).any()


@pytest.mark.parametrize(
    ("width", "sparsity", "gamma", "gone", "learned"), [(256, 0.95, 0.95, 100, 90), (512, 0.99, 0.3, 100, 80)]
)
def test_on_digits_neurons_go_and_come_back_and_the_model_learns(width, sparsity, gamma, gone, learned):
    digits = load_digits()
    torch.manual_seed(0)
    hidden = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
    method = srigl(every=10, stop=150, gamma_sal=gamma)
    sparse = fxsparse.compile(model, Plan(sparsity=sparsity, method=method, storage="masked"))
    alive = []

    def note(*_):
        alive.append({name: fan_ins(mask) > 0 for name, mask in sparse.masks().items()})

    def attach(optimizer):
        sparse.attach(optimizer)
        optimizer.register_step_post_hook(note)

    train_on_digits(sparse, digits.draw, steps=200, rate=3e-3, attach=attach)
    left = {name: int(neurons.sum()) for name, neurons in alive[-1].items()}
    assert left["5.weight"] == 10
    assert left["1.weight"] + left["3.weight"] <= 2 * width - gone
    back = sum(
        int((now[name] & ~then[name]).sum()) for then, now in itertools.pairwise(alive) for name in left
    )
    assert back > 0
    assert accuracy(sparse, digits) > learned
