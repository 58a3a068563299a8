import pickle

import pytest
import torch
import torchvision
from torch import nn

import fxsparse
from fxsparse import Budget, Override, Plan
from fxsparse.errors import PlanError
from fxsparse.methods import dual_averaging, imp, rigl, spartan
from fxsparse.passes import price_weights
from fxsparse.pattern import NM, Block, Strided


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


X = torch.randn(8, 64)


def planned(model, budget, x=X, **plan):
    return fxsparse.plan_report(model, Plan(budget=budget, **plan), x)


@pytest.mark.parametrize("allocation", ["uniform", "erk", "er", "er_unrolled", "global_magnitude"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_flops_are_what_was_asked_for(allocation, share):
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    x = torch.randn(2, 3, 64, 64)
    plan = Plan(budget=Budget(flops=share), allocation=allocation, exclude=("conv1", "fc"))
    count = fxsparse.count_flops(model, x, plan)
    assert share - 1e-3 < count.total / count.dense <= share


@pytest.mark.parametrize(
    ("overall", "masked"), [(0.2, 0.1983), (0.1, 0.09809), (0.05, 0.04798), (0.025, 0.02293), (0.01, 0.0079)]
)
def test_all_parameters_of_a_resnet_50_count_in_its_overall_sparsity(overall, masked):
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    counts = fxsparse.allocate(model, Plan(budget=Budget(parameters=overall), allocation="uniform"))
    assert sum(counts.values()) / 25_502_912 == pytest.approx(masked, abs=5e-5)
    assert sum(counts.values()) + 25_557_032 - 25_502_912 == pytest.approx(overall * 25_557_032, rel=1e-4)


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global_magnitude"])
def test_bytes_are_those_of_csr_beside_what_stays_dense(allocation):
    model = mlp()
    counts = fxsparse.allocate(model, Plan(budget=Budget(bytes=0.3), allocation=allocation), X)
    dense = sum(p.nbytes for p in model.parameters())
    stored = 4 * 110 + sum(
        6 * nnz + 4 * (rows + 1) for nnz, rows in zip(counts.values(), (100, 10), strict=True)
    )
    assert 0.29 < stored / dense <= 0.3


def test_costs_decide_what_an_entry_is_worth():
    plan = Plan(budget=Budget(total=0.5, cost={"0": 10.0}), allocation="global_magnitude")
    counts = fxsparse.allocate(mlp(), plan, X)
    spent, dense = 10 * counts["0.weight"] + counts["2.weight"], 10 * 6400 + 1000
    assert dense * 0.5 - 11 < spent <= dense * 0.5
    first, second = (mlp()[i].weight.detach().abs().flatten() for i in (0, 2))
    threshold = (first / 10).topk(counts["0.weight"]).values[-1]
    assert counts["2.weight"] == pytest.approx(int((second >= threshold).sum()), abs=1)


def test_costs_of_one_are_a_sparsity():
    counts = fxsparse.allocate(mlp(), Plan(budget=Budget(total=0.1), allocation="uniform"), X)
    assert counts == fxsparse.allocate(mlp(), Plan(sparsity=0.9, allocation="uniform"), X)


def test_the_report_says_what_the_budget_became():
    report = planned(mlp(), Budget(flops=0.5), allocation="uniform")
    (row,) = [row for row in report.passes if row["name"] == "allocate-nnz"]
    assert "budget: 0.5 of 14800 FLOP is met with" in row["notes"][0]
    assert report.totals["flops_sparse"] <= 7400


def test_a_budget_is_for_every_method_and_exact_in_blocks():
    sparse = fxsparse.compile(
        mlp(), Plan(budget=Budget(total=0.25), method=rigl(every=1, stop=9), exclude=("2",)), example_inputs=X
    )
    assert sparse.sparsity()["total"] == pytest.approx(0.75, abs=1e-3)
    plan = Plan(budget=Budget(flops=0.3), pattern=Block(4, 4), exclude=("2",))
    assert fxsparse.count_flops(mlp(), X, plan).total <= 0.3 * 14800


def test_spartan_ranks_all_weights_by_magnitude_per_cost_and_spends_the_budget():
    plan = Plan(
        budget=Budget(total=0.3, cost={"0": 5.0}), allocation="global_magnitude", method=spartan(steps=20)
    )
    sparse = fxsparse.compile(mlp(), plan, example_inputs=X)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
    sparse.attach(optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        sparse(X).square().mean().backward()
        optimizer.step()
    masks = sparse.masks()
    spent = 5 * int(masks["0.weight"].sum()) + int(masks["2.weight"].sum())
    # As many as the budget pays for, and one more where it falls between two entries.
    assert 0.3 * 33_000 - 6 <= spent <= 0.3 * 33_000 + 5
    worst = min(
        float((sparse.get_parameter(f"{i}.weight").detach().abs() / cost)[masks[f"{i}.weight"]].min())
        for i, cost in ((0, 5.0), (2, 1.0))
    )
    best = max(
        float(
            (sparse.get_parameter(f"{i}.weight").detach().abs() / cost)
            .masked_fill(masks[f"{i}.weight"], 0)
            .max()
        )
        for i, cost in ((0, 5.0), (2, 1.0))
    )
    assert best <= worst


def test_plans_with_budgets_come_back_from_a_file(tmp_path):
    for budget in (Budget(flops=0.5), Budget(total=0.2, cost={"0": 2.0})):
        plan = Plan(budget=budget, method=spartan(steps=50))
        plan.save(tmp_path / "plan.toml")
        assert Plan.load(tmp_path / "plan.toml") == plan
        assert Plan.load(tmp_path / "plan.toml").budget.cost == budget.cost


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Budget(), "exactly one of parameters, flops, bytes, latency, total, got none"),
        (lambda: Budget(flops=0.5, bytes=0.5), "got flops, bytes"),
        (lambda: Budget(flops=0), r"share of dense in \(0, 1\], got 0"),
        (lambda: Budget(flops=1.5), "got 1.5"),
        (lambda: Budget(flops=True), "got True"),
        (lambda: Budget(flops=0.5, cost={"0": 1.0}), r"cost=\) goes with total="),
        (lambda: Budget(total=0.5, cost={"0": 0}), "a number above 0"),
        (lambda: Plan(sparsity=0.5, budget=Budget(flops=0.5)), "either a sparsity or a budget"),
        (lambda: Plan(budget=0.5), "expected a Budget"),
        (lambda: Plan(budget=Budget(flops=0.5), pattern=NM(2, 4)), "fixes every count"),
        (lambda: Plan(budget=Budget(flops=0.5), pattern=Strided(4)), "fixes every count"),
        (lambda: Plan(budget=Budget(flops=0.5), allocation={"0": 0.5}), "a table of sparsities"),
        (
            lambda: planned(mlp(), Budget(total=0.5, cost={"nothing": 2.0})),
            "names none of 0.weight, 2.weight",
        ),
        (lambda: planned(mlp(), Budget(flops=0.5), x=None), "expected example inputs"),
        (lambda: planned(mlp(), Budget(flops=0.05), exclude=("0",)), r"still costs 12\d+"),
    ],
)
def test_what_cannot_be_spent_is_refused(wrong, message):
    with pytest.raises(PlanError, match=message):
        wrong()


def test_latency_is_priced_by_the_kernels_of_this_machine(monkeypatch):
    from fxsparse import choosing, kernel
    from fxsparse.choosing import Choice
    from fxsparse.passes import time_weights

    def choose(problem, x, weight, bias=None, activation="none", **options):
        numel, nnz = weight.numel(), int((weight != 0).sum())
        assert nnz == problem.nnz
        return Choice(kernel.registered()["dense"], {"dense": numel / 100, "cpu-csr": nnz / 50}, {}, "")

    monkeypatch.setattr(choosing, "choose", choose)
    monkeypatch.setattr(time_weights, "_others_us", lambda ctx, calls: 26.0)
    # Dense: 64 + 10 us, and 26 for the rest; CSR needs 2 us for every hundred entries and wins below half.
    counts = fxsparse.allocate(mlp(), Plan(budget=Budget(latency=0.5), allocation="uniform"), X)
    assert 26 + 2 * sum(counts.values()) / 100 == pytest.approx(50, abs=0.1)


class Bottleneck(nn.Module):
    """Weights of very different sizes and magnitudes: 256, 8,000 and 20,000 entries."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 4, bias=False), nn.Linear(4, 2000, bias=False)
        self.c = nn.Linear(2000, 10, bias=False)
        self.b.weight.data *= factor

    def forward(self, x):
        return self.c(self.b(self.a(x)).relu())


def trained(plan: Plan, factor: float, frozen_at: int = 10):
    sparse = fxsparse.compile(Bottleneck(factor), plan, example_inputs=X)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-4)
    sparse.attach(optimizer)
    for _ in range(frozen_at):
        optimizer.zero_grad()
        sparse(X).tanh().mean().backward()
        optimizer.step()
    return sparse


@pytest.mark.parametrize("method", [spartan, dual_averaging, imp])
@pytest.mark.parametrize(("factor", "share"), [(0.001, 0.7), (100.0, 0.4), (1.0, 0.2)])
def test_masks_that_share_bytes_meet_them_wherever_they_drift(method, factor, share):
    sparse = trained(Plan(budget=Budget(bytes=share), method=method(steps=10)), factor)
    stored = sum(
        min(4 * mask.numel(), 4 * (len(mask) + 1) + 6 * int(mask.sum())) for mask in sparse.masks().values()
    )
    dense = sum(4 * mask.numel() for mask in sparse.masks().values())
    assert share * dense - 6 < stored <= share * dense


@pytest.mark.parametrize("factor", [0.001, 1.0, 100.0])
def test_masks_that_share_costs_of_the_user_never_exceed_them(factor):
    budget = Budget(total=0.3, cost={"a": 50.0, "b": 7.0})
    sparse = trained(Plan(budget=budget, method=spartan(steps=10)), factor)
    each = {"a.weight": 50, "b.weight": 7, "c.weight": 1}
    spent = sum(each[name] * int(mask.sum()) for name, mask in sparse.masks().items())
    dense = sum(each[name] * mask.numel() for name, mask in sparse.masks().items())
    assert 0.3 * dense - 50 < spent <= 0.3 * dense


def test_a_weight_kept_dense_is_paid_for_before_the_others_share_the_rest():
    plan = Plan(budget=Budget(flops=0.5), method=imp(steps=10), overrides=(Override("b", sparsity=0),))
    masks = trained(plan, 1.0).masks()
    assert int(masks["b.weight"].sum()) == 8000
    # Every entry takes part in one multiplication: 14,128 of 28,256 stay, 8,000 of them in b.
    assert sum(int(mask.sum()) for mask in masks.values()) == 14_128


def test_a_saved_module_goes_on_within_its_budget_without_pricing_it_again(tmp_path, monkeypatch):
    plan = Plan(budget=Budget(bytes=0.4), method=spartan(steps=10))
    sparse = trained(plan, 100.0, frozen_at=5)
    fxsparse.save(sparse, tmp_path / "model.safetensors")
    monkeypatch.setattr(price_weights, "_PRICES", {})
    for again in (
        fxsparse.load(tmp_path / "model.safetensors", Bottleneck(1.0)),
        pickle.loads(pickle.dumps(sparse)),
    ):
        for each in (sparse, again):
            assert each._emitted.targets == sparse._emitted.targets
        assert all(torch.equal(mask, sparse.masks()[name]) for name, mask in again.masks().items())


@pytest.mark.parametrize("allocation", ["uniform", "erk", "global_magnitude"])
def test_dense_weights_that_count_in_the_sparsity_change_no_budget(allocation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    wishes = {"budget": Budget(flops=0.5), "exclude": ("0",), "allocation": allocation}
    counts = [
        fxsparse.allocate(model, Plan(keep_dense_counts=kept, **wishes), torch.randn(4, 32))
        for kept in (True, False)
    ]
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) + 2048 == pytest.approx((2048 + 4096 + 640) / 2, abs=2)


def test_time_is_not_measured_on_meta():
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(
        PlanError, match=r"Budget\(latency=\): expected a model with values.*'0.weight' is on meta"
    ):
        fxsparse.plan_report(model, Plan(budget=Budget(latency=0.5)), X)
