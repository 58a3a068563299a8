import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxsparse
from fxsparse import Budget, Override, Plan
from fxsparse.errors import CheckpointError, NumericsError, PlanError
from fxsparse.methods import dual_averaging, imp, spartan, static
from fxsparse.pattern import NM, Block, ConstantFanIn
from fxsparse.soft_masks import BETA, FROZEN, SHIFT
from fxsparse.topk import soft_topk, top_mask

METHODS = (spartan, dual_averaging, imp)
X, Y = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 10


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


def build(method, sparsity: float = 0.9, **plan):
    plan = {"allocation": "uniform"} | plan
    sparse = fxsparse.compile(mlp(), Plan(sparsity=sparsity, method=method, **plan), example_inputs=X)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer)
    return sparse, optimizer


def step(sparse, optimizer, parts: int = 1) -> float:
    optimizer.zero_grad()
    for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
        (F.cross_entropy(sparse(x), y) / parts).backward()
    optimizer.step()
    return float(sum(p.detach().double().abs().sum() for p in sparse.parameters()))


def magnitudes(sparse) -> Tensor:
    return torch.cat([sparse.get_parameter(f"{i}.weight").detach().abs().flatten() for i in (0, 2)])


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_follows_its_schedule_exactly_and_then_stays(method):
    # 7,400 weights of which 740 stay: 20 steps ramp over 4, and freeze after 16.
    sparse, optimizer = build(method(steps=20))
    counts = []
    for _ in range(20):
        step(sparse, optimizer)
        counts.append(sum(int(mask.sum()) for mask in sparse.masks().values()))
    assert counts == [740 + round(6660 * (1 - t / 4)) for t in (1, 2, 3)] + [740] * 17


def test_all_parameters_count_in_a_budget_of_parameters():
    """The reference's MLP 64-100-10 over 20 steps: 6,759 zeros of 7,510 parameters, 0.0866 of the masked ones kept."""
    plan = Plan(budget=Budget(parameters=0.1), method=spartan(steps=20), allocation="uniform")
    sparse = fxsparse.compile(mlp(), plan, example_inputs=X)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    kept = []
    for _ in range(6):
        step(sparse, optimizer)
        kept.append(sum(int(mask.sum()) for mask in sparse.masks().values()))
    assert [round(count / 7400, 3) for count in kept] == [0.772, 0.543, 0.315, 0.087, 0.087, 0.087]
    assert 7400 - kept[-1] == 6759


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_the_largest_magnitudes_of_all_weights_together(method):
    sparse, optimizer = build(method(steps=20))
    for _ in range(6):
        step(sparse, optimizer)
    expected = top_mask(magnitudes(sparse), 740)
    assert torch.equal(torch.cat([mask.flatten() for mask in sparse.masks().values()]), expected)


def test_each_layer_keeps_its_own_count_where_asked():
    sparse, optimizer = build(spartan(steps=20, scope="layer"))
    for _ in range(6):
        step(sparse, optimizer)
    assert {name: int(mask.sum()) for name, mask in sparse.masks().items()} == {
        "0.weight": 640,
        "2.weight": 100,
    }
    assert sparse.get_buffer("fxsparse_budgets").shape == (2, 3)


def test_the_effective_weight_is_the_soft_topk_cut_to_the_hard_one():
    sparse, optimizer = build(spartan(steps=20))
    for _ in range(6):
        step(sparse, optimizer)
    beta = 1 + 9 * 6 / 16
    numbers = sparse.get_buffer("fxsparse_budgets")[0]
    assert numbers[BETA] == pytest.approx(beta)
    soft = soft_topk(magnitudes(sparse), 740, beta=beta)
    kept = torch.cat([mask.flatten() for mask in sparse.masks().values()])
    weight = torch.cat([sparse.get_parameter(f"{i}.weight").detach().flatten() for i in (0, 2)])
    folded = sparse.to_dense()
    got = torch.cat([folded.get_parameter(f"{i}.weight").detach().flatten() for i in (0, 2)])
    torch.testing.assert_close(got, weight * soft * kept, rtol=1e-5, atol=1e-8)


def test_frozen_masks_stay_as_they_are_and_only_kept_weights_move():
    sparse, _ = build(spartan(steps=20, scope="layer"))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    for _ in range(16):
        step(sparse, optimizer)
    numbers = sparse.get_buffer("fxsparse_budgets")[0].clone()
    assert (float(numbers[FROZEN]), float(numbers[BETA])) == (1.0, 10.0)
    soft, weight = sparse.get_buffer("0.weight_soft").clone(), sparse.get_parameter("0.weight")
    before = weight.detach().clone()
    for _ in range(4):
        step(sparse, optimizer)
    assert torch.equal(sparse.get_buffer("0.weight_soft"), soft)
    moved = weight.detach() != before
    assert bool(moved.any())
    assert not bool((moved & (soft == 0)).any())
    assert torch.equal(sparse.get_buffer("fxsparse_budgets")[0], numbers)


def test_folding_keeps_the_logits_where_a_binary_mask_would_not():
    sparse, optimizer = build(spartan(steps=20))
    for _ in range(20):
        step(sparse, optimizer)
    logits = sparse.eval()(X).detach()
    torch.testing.assert_close(sparse.to_dense().eval()(X).detach(), logits)
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=X)
    torch.testing.assert_close(fast(X), logits, rtol=1e-4, atol=1e-5)
    assert not [key for key in fast.state_dict() if "soft" in key or "fxsparse" in key or "mask" in key]
    binary = copy.deepcopy(sparse)
    for name in ("0.weight", "2.weight"):
        binary.get_buffer(f"{name}_soft").copy_(binary.masks()[name])
    assert float((binary(X).detach() - logits).abs().max()) > 0.1 * float(logits.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_gradient_accumulation_equals_one_batch(method):
    (one, first), (two, second) = build(method(steps=20)), build(method(steps=20))
    for _ in range(8):
        step(one, first)
        step(two, second, parts=2)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_resumed_runs_go_on_bit_for_bit(method):
    sparse, optimizer = build(method(steps=20))
    for _ in range(9):
        step(sparse, optimizer)
    runs = [(sparse, optimizer), build(method(steps=20)), (copy.deepcopy(sparse), None)]
    runs[1][0].load_state_dict(copy.deepcopy(sparse.state_dict()))
    runs[2] = (runs[2][0], torch.optim.AdamW(runs[2][0].parameters(), lr=0.01))
    for other, its_optimizer in runs[1:]:
        its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.attach(its_optimizer)
    ends = [[step(*run) for _ in range(9)] for run in runs]
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_gradscaler_skips_moves_neither_budget_nor_sharpness(method):
    (sparse, optimizer), (other, its_optimizer) = build(method(steps=20)), build(method(steps=20))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(6):
        before = {name: value.clone() for name, value in sparse.state_dict().items()}
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(sparse(X).float(), Y)
        scaler.scale(loss * float("inf") if number == 3 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if number == 3:
            assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
        else:
            step(other, its_optimizer)
        assert int(sparse.state_dict()["fxsparse_step"]) == number + (number < 3)
    counts = [{name: int(mask.sum()) for name, mask in each.masks().items()} for each in (sparse, other)]
    assert sum(counts[0].values()) == sum(counts[1].values()) == 740


def test_the_soft_topk_is_computed_in_float32_under_autocast():
    sparse, optimizer = build(spartan(steps=20))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            step(sparse, optimizer)
    shift, mask = sparse.get_buffer("fxsparse_budgets")[0], sparse.masks()["0.weight"]
    exact = torch.sigmoid(
        shift[BETA] * sparse.get_parameter("0.weight").detach().abs().double() + shift[SHIFT]
    )
    torch.testing.assert_close(
        sparse.get_buffer("0.weight_soft").double(), exact * mask, rtol=1e-5, atol=1e-7
    )


def test_averaged_weights_are_those_of_the_steps():
    sparse, optimizer = build(spartan(steps=20))
    average = AveragedModel(sparse)
    seen = []
    for _ in range(6):
        step(sparse, optimizer)
        average.update_parameters(sparse)
        seen.append(sparse.get_parameter("0.weight").detach().clone())
    torch.testing.assert_close(average.module.get_parameter("0.weight"), torch.stack(seen).mean(0))
    assert bool(average(X).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [{"sparsity": 0.9}, {"budget": Budget(bytes=0.3)}])
def test_averaged_masks_are_refused_where_the_weights_are_folded(method, budget):
    sparse = fxsparse.compile(mlp(), Plan(method=method(steps=40), **budget), example_inputs=X)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer)
    averages = [
        AveragedModel(sparse, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=used)
        for used in (True, False)
    ]
    for _ in range(24):
        step(sparse, optimizer)
        for average in averages:
            average.update_parameters(sparse)
    union, copied = (average.module for average in averages)
    for fold in (
        lambda: union.to_dense(),
        lambda: union.dense_state_dict(),
        lambda: fxsparse.compile(union, mode="infer"),
    ):
        with pytest.raises(
            CheckpointError, match=r"steps is (740|8,572): .*Masks cannot be averaged: .*use_buffers=False"
        ):
            fold()
    masks = sparse.masks()
    for name, weight in copied.dense_state_dict().items():
        assert not name.endswith("weight") or not bool(weight[~masks[name]].any())


def test_an_average_of_the_floats_of_a_state_dict_keeps_the_zeros():
    """As timm's EMA does: soft masks and budgets are averaged, masks are copied."""
    sparse, optimizer = build(spartan(steps=20))
    average = copy.deepcopy(sparse)
    for _ in range(20):
        step(sparse, optimizer)
        for mine, theirs in zip(average.state_dict().values(), sparse.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 0.5)
            else:
                mine.copy_(theirs)
    assert bool(((average.get_buffer("0.weight_soft") != 0) & ~sparse.masks()["0.weight"]).any())
    folded = average.to_dense()
    assert sum(int((folded[i].weight != 0).sum()) for i in (0, 2)) == 740
    torch.testing.assert_close(average.eval()(X), folded(X))
    fast = fxsparse.compile(average, mode="infer", example_inputs=X)
    torch.testing.assert_close(fast(X), folded(X), rtol=1e-4, atol=1e-5)


def test_blocks_are_kept_whole_and_as_many_as_the_budget_pays_for():
    sparse, optimizer = build(spartan(steps=20), 0.9, pattern=Block(4, 4), exclude=("2",))
    for _ in range(8):
        step(sparse, optimizer)
    mask = sparse.masks()["0.weight"]
    Block(4, 4).check(mask)
    assert int(mask.sum()) == 640
    assert float(sparse.get_buffer("fxsparse_budgets")[0, BETA]) == pytest.approx(1 + (10 * 4 - 1) * 8 / 16)
    blocks = sparse.get_buffer("0.weight_soft").view(25, 4, 16, 4)
    assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))


def test_blocks_that_do_not_fit_are_refused_by_name():
    with pytest.raises(fxsparse.errors.PatternError, match=r"2.weight.*multiple of 4"):
        build(spartan(steps=20), pattern=Block(4, 4))


def test_compiled_training_is_the_same_in_one_graph():
    (plain, first), (compiled, second) = build(spartan(steps=20)), build(spartan(steps=20))
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter)
    for _ in range(18):
        step(plain, first)
        second.zero_grad()
        F.cross_entropy(run(X), Y).backward()
        second.step()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("halfway", [False, True])
def test_weights_that_do_not_train_are_masked_as_any_other(method, halfway):
    model = mlp()
    model[2].weight.requires_grad_(halfway)
    plan = Plan(sparsity=0.9, method=method(steps=20), allocation="uniform")
    sparse = fxsparse.compile(model, plan, example_inputs=X)
    optimizer = torch.optim.SGD([p for p in sparse.parameters() if p.requires_grad], lr=0.1)
    sparse.attach(optimizer)
    for number in range(8):
        if number == 4:
            model[2].weight.requires_grad_(False)
        step(sparse, optimizer)
    expected = top_mask(magnitudes(sparse), 740)
    assert torch.equal(torch.cat([mask.flatten() for mask in sparse.masks().values()]), expected)


def test_the_gradient_beside_a_frozen_weight_is_exact():
    sparse, optimizer = build(spartan(steps=20), 0.5)
    sparse.get_parameter("2.weight").requires_grad_(False)
    for _ in range(6):
        step(sparse, optimizer)
    weights = [sparse.get_parameter(f"{i}.weight").detach() for i in (0, 2)]
    trained = weights[0].clone().requires_grad_()
    soft = soft_topk(
        torch.cat([trained.abs().flatten(), weights[1].abs().flatten()]), 3700, beta=1 + 9 * 6 / 16
    )
    made = []
    for part, w, name in zip(soft.split([6400, 1000]), (trained, weights[1]), ("0", "2"), strict=True):
        mask = sparse.masks()[f"{name}.weight"]
        whole = w * part.view(w.shape)
        made.append(whole - (whole * ~mask).detach())  # the cut is straight through
    reference = sparse.to_dense()
    hidden = F.linear(X, made[0], reference[0].bias).relu()
    F.cross_entropy(F.linear(hidden, made[1], reference[2].bias), Y).backward()
    optimizer.zero_grad()
    F.cross_entropy(sparse(X), Y).backward()
    torch.testing.assert_close(sparse.get_parameter("0.weight").grad, trained.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_gradient_is_the_dense_one(method):
    sparse, _ = build(method(steps=20))
    dense = mlp()
    for model in (sparse, dense):
        F.cross_entropy(model(X), Y).backward()
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [NM(2, 4), ConstantFanIn(8)])
def test_patterns_that_a_choice_of_the_largest_cannot_give_are_refused(method, pattern):
    with pytest.raises(PlanError, match=r"Plan.pattern: .*expected Unstructured\(\) or Block.*got"):
        Plan(sparsity=0.5, method=method(steps=20), pattern=pattern)
    with pytest.raises(PlanError, match=r"Override\('0'\).pattern: .*expected Unstructured"):
        Plan(sparsity=0.5, method=method(steps=20), overrides=(Override("0", pattern=pattern),))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_weight_that_an_override_keeps_dense_stays_out_of_the_budget(method, scope):
    sparse, optimizer = build(
        method(steps=20, scope=scope), 0.9, overrides=(Override("2", sparsity=0),), pattern=Block(4, 4)
    )
    for _ in range(20):
        step(sparse, optimizer)
    assert {name: int(mask.sum()) for name, mask in sparse.masks().items()} == {
        "0.weight": 640,
        "2.weight": 1000,
    }
    dense = sparse.to_dense()
    assert torch.equal(dense[2].weight, sparse.get_parameter("2.weight"))
    torch.testing.assert_close(dense(X), sparse(X))
    again = pickle.loads(pickle.dumps(sparse))
    assert torch.equal(again(X), sparse(X))


def test_counts_of_one_weight_are_refused_where_all_share_a_budget():
    for wish in ({"allocation": {"0": 0.5}}, {"overrides": (Override("0", sparsity=0.2),)}):
        with pytest.raises(PlanError, match=r"share one budget: .*scope='layer'"):
            Plan(sparsity=0.9, method=spartan(steps=20), **wish)
        assert build(spartan(steps=20, scope="layer"), **wish)[0](X).shape == (32, 10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", [mlp, lambda: nn.Sequential(nn.ReLU())])
def test_a_model_with_nothing_to_prune_is_left_dense(method, model):
    plan = Plan(budget=Budget(total=0.5), method=method(steps=5), exclude=("*",) if model is mlp else ())
    built = model()
    with pytest.warns(UserWarning, match="the plan selected none"):
        sparse = fxsparse.compile(built, plan, example_inputs=X)
    torch.testing.assert_close(sparse(X), model()(X))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1)), *sparse.parameters()], lr=0.1)
    sparse.attach(optimizer)
    optimizer.step()
    assert sparse.report.totals["numel"] == 0
    torch.testing.assert_close(sparse.to_dense()(X), sparse(X))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [{"sparsity": 0.9}, {"budget": Budget(bytes=0.5)}])
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "2 NaN"), (float("-inf"), "2 inf")])
def test_a_weight_that_has_diverged_is_named(method, budget, value, said):
    plan = Plan(method=method(steps=20), **budget)
    sparse = fxsparse.compile(mlp(), plan, example_inputs=X)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    step(sparse, optimizer)
    with torch.no_grad():
        sparse.get_parameter("2.weight")[1, 2:4] = value
    optimizer.zero_grad()
    with pytest.raises(NumericsError, match=f"'2.weight': .*after step 2, got {said} among 1000 entries"):
        optimizer.step()


@pytest.mark.parametrize(
    ("method", "value", "said"),
    [
        (spartan(steps=20), "nan", "1 NaN"),
        (imp(steps=20), "-inf", "1 inf"),
        (static("magnitude"), "nan", "1 NaN"),
    ],
)
def test_a_weight_without_numbers_is_named_when_it_is_compiled(method, value, said):
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float(value)
    with pytest.raises(NumericsError, match=f"weight '2.weight': .*{said} among 1000"):
        fxsparse.compile(model, Plan(sparsity=0.9, method=method))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps as a number of optimizer steps"),
        ({"beta": 0.5}, "beta as a number >= 1"),
        ({"beta": float("inf")}, "beta as a number >= 1"),
        ({"scope": "all"}, "scope as global or layer"),
        ({"warmup": 0}, "warmup as a share"),
        ({"warmup": 0.6, "finetune": 0.5}, "at most 1"),
        (
            {"steps": 5, "warmup": 0.01},
            "a warmup of at least one of the 5 steps, got a share of 0.01, which is 0",
        ),
        ({"steps": 5, "finetune": 0.99}, "a step before the finetune"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(PlanError, match=message):
        spartan(**options)


def test_a_model_without_a_graph_is_refused_with_the_reason():
    class Walked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)
            self.fc.register_forward_hook(lambda *_: None)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)

    with pytest.raises(PlanError, match="takes a graph of the model"):
        fxsparse.compile(Walked(), Plan(sparsity=0.9, method=spartan(steps=20)), example_inputs=X)


def test_a_weight_without_an_entry_left_is_a_note_of_the_report():
    plan = Plan(budget=Budget(total=0.1, cost={"2": 5.0}), method=spartan(steps=20))
    sparse = fxsparse.compile(mlp(), plan, example_inputs=X)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.001)
    sparse.attach(optimizer)
    assert sparse.report.to_dict()["notes"] == []
    for _ in range(20):
        step(sparse, optimizer)
    emptied = next(
        row["step"] for row in sparse.report.topology.rows() if row["name"] == "2.weight" and not row["nnz"]
    )
    (note,) = (note for note in sparse.report.to_dict()["notes"] if "2.weight" in note)
    assert f"2.weight: its mask kept no entry at step {emptied}, and keeps 0 now" in note
    assert note in str(sparse.report).replace("\n", " ")


def test_the_shift_solves_the_budget_of_the_step():
    sparse, optimizer = build(spartan(steps=20))
    for _ in range(6):
        step(sparse, optimizer)
    numbers = sparse.get_buffer("fxsparse_budgets")[0]
    mask = torch.sigmoid(numbers[BETA] * magnitudes(sparse).double() + numbers[SHIFT])
    assert float(mask.sum()) == pytest.approx(740, rel=1e-5)


def test_blocks_of_a_convolution_are_kept_whole_and_train():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    )
    plan = Plan(
        sparsity=0.75, allocation="uniform", pattern=Block(4, 4), method=spartan(steps=20), exclude=("4",)
    )
    images = X.reshape(32, 1, 8, 8).expand(-1, 8, -1, -1)
    sparse = fxsparse.compile(model, plan, example_inputs=images)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    sparse.attach(optimizer)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(sparse(images), Y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for mask in list(sparse.masks().values()):
        Block(4, 4).check(mask)
    assert sum(int(mask.sum()) for mask in sparse.masks().values()) == 0.25 * 2 * 8 * 16 * 9
    assert losses[-1] < losses[0]
    fast = fxsparse.compile(sparse.eval(), mode="infer", example_inputs=images)
    torch.testing.assert_close(fast(images), sparse(images).detach())
