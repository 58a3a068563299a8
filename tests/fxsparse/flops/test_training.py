from dataclasses import dataclass, replace
from statistics import fmean

import pytest
import torchvision

from fxsparse.errors import PlanError
from fxsparse.flops import Stored, count_program
from fxsparse.flops.training import average_counts, probe_flops, train_flops, update_share
from fxsparse.method import Probe
from fxsparse.methods import gmp, rigl, set_, sr_ste, static


def forward(counts):
    return 10 * counts["w"]


COUNTS, NUMELS = {"w": 20}, {"w": 100}  # f_S = 200, f_D = 1000


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (static(), 600),  # 3 f_S
        (set_(every=10, stop=100), 600),
        (rigl(every=9, stop=100), (3 * 200 * 9 + 2 * 200 + 1000) / 10),
        # The optimizer steps at an update too: of every 10 steps one has a dense gradient.
        (rigl(every=10, stop=100, variant="torch"), (9 * 3 * 200 + 2 * 200 + 1000) / 10),
        (sr_ste(), 2 * 200 + 1000),  # the gradient is dense at every step
    ],
)
def test_training_flops_follow_from_what_a_method_declares(method, expected):
    assert train_flops(method, forward, COUNTS, NUMELS) == pytest.approx(expected, rel=1e-12)


@dataclass(frozen=True)
class Sampled:
    """As much of GSE's rule as FLOPs depend on."""

    candidates: float
    probe: Probe = Probe.SAMPLED

    def __call__(self, view):
        return view.active


class SilentRule:
    probe = Probe.SAMPLED


def gse(gamma, every=100):
    return replace(rigl(every=every), name="gse", rule=Sampled(gamma))


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2])
def test_sampled_gradients_cost_by_the_candidates(gamma):
    expected = (3 * 200 * 9 + 2 * 200 + (1 + gamma) * 200) / 10
    assert train_flops(gse(gamma, every=9), forward, COUNTS, NUMELS) == pytest.approx(expected, rel=1e-12)


def test_a_sampling_rule_says_how_many_candidates_it_has():
    with pytest.raises(PlanError, match="SilentRule has none"):
        train_flops(replace(rigl(), rule=SilentRule()), forward, COUNTS, NUMELS)


def test_a_ramp_is_averaged_over_its_steps():
    method = gmp(start=2, stop=4, every=1)
    # Nonzeros at steps 0 to 4: 100 twice, then 20 + 80 (1 - done)^3 at done 0, 1/2, 1.
    assert average_counts(method, COUNTS, NUMELS) == {"w": (100 + 100 + 100 + 30 + 20) / 5}
    assert train_flops(method, forward, COUNTS, NUMELS) == pytest.approx(3 * 10 * 70)
    assert train_flops(method, forward, COUNTS, NUMELS, settled={"w"}) == pytest.approx(3 * 10 * 20)


def test_only_a_schedule_that_ends_can_be_averaged():
    with pytest.raises(ValueError, match="'static' has no schedule that ends"):
        average_counts(static(), COUNTS, NUMELS)


def test_a_dense_gradient_costs_nothing_where_no_update_needs_it():
    assert probe_flops(set_(every=10, stop=100), 200, 1000) == 0
    assert update_share(static()) == 0


@pytest.mark.parametrize(
    ("policy", "sparsity", "ratio"),
    [("erk", 0.8, 0.4165), ("erk", 0.9, 0.2454), ("uniform", 0.8, 0.2267), ("uniform", 0.9, 0.1300)],
)
def test_resnet50_training_ratios_of_rigl(traced_on_meta, stored, policy, sparsity, ratio):
    graph, specs = traced_on_meta(torchvision.models.resnet50, 2, 3, 224, 224)
    held = stored(specs, policy, sparsity, forced={"conv1.weight": 0.0} if policy == "uniform" else {})
    assert round(count_program(graph, held, rigl(every=100), "rigl").train_ratio, 4) == ratio


@pytest.mark.parametrize(("sparsity", "ratio"), [(0.8, 0.5596), (0.9, 0.5045)])
def test_resnet50_average_of_gradual_pruning(traced_on_meta, stored, sparsity, ratio):
    # Published from a ramp of 10k to 25k of 32k steps, looked at every 1,000 steps, both ends included.
    graph, specs = traced_on_meta(torchvision.models.resnet50, 2, 3, 224, 224)
    final = stored(specs, "uniform", sparsity, forced={"conv1.weight": 0.0})
    method, moments = gmp(start=10_000, stop=25_000, every=1_000), range(0, 32_001, 1_000)
    average = {
        name: Stored(round(fmean(method.nnz(t, held.nnz, held.numel) for t in moments)), held.numel)
        for name, held in final.items()
    }
    count = count_program(graph, average, convention="rigl")
    assert round(count.total / count.dense, 4) == ratio


@pytest.mark.parametrize(
    ("policy", "gamma", "savings"),
    [
        ("er_unrolled", 1, {0.90: 0.7, 0.95: 1.9, 0.98: 5.6, 0.99: 11.2, 0.999: 56.8}),
        ("erk", 1, {0.90: 0.7, 0.95: 2.0, 0.98: 5.8, 0.99: 11.4, 0.999: 57.4}),
        ("uniform", 1, {0.90: 2.6, 0.95: 5.6, 0.98: 13.6, 0.99: 24.4, 0.999: 76.7}),
        ("er_unrolled", 0, {0.99: 11.4}),
        ("erk", 0, {0.99: 11.7}),
    ],
)
def test_what_gse_saves_against_rigl_on_resnet50(traced_on_meta, stored, policy, gamma, savings):
    graph, specs = traced_on_meta(torchvision.models.resnet50, 2, 3, 224, 224)
    for sparsity, percent in savings.items():
        held = stored(specs, policy, sparsity)
        ratios = [count_program(graph, held, m).train_ratio for m in (gse(gamma), rigl(every=100))]
        assert round(100 * (1 - ratios[0] / ratios[1]), 1) == percent


def test_with_updates_as_rare_as_in_its_experiments_gse_saves_little(traced_on_meta, stored):
    graph, specs = traced_on_meta(torchvision.models.resnet50, 2, 3, 224, 224)
    held = stored(specs, "er_unrolled", 0.99)
    ratios = [count_program(graph, held, m).train_ratio for m in (gse(1, every=1000), rigl(every=1000))]
    assert round(100 * (1 - ratios[0] / ratios[1]), 1) == 1.3
