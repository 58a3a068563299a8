import random

import pytest
import torch

from fxsparse.allocation import POLICIES, Target, check, resolve
from fxsparse.allocation.explicit import Explicit
from fxsparse.errors import PlanError

policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@pytest.fixture
def specs(shape):
    return [
        shape("stem", (16, 3, 3, 3), "conv2d"),
        shape("depthwise", (16, 1, 3, 3), "conv2d"),
        shape("in_proj", (96, 32)),
        shape("head", (10, 96)),
    ]


def target(specs, sparsity, **options):
    generator = torch.Generator().manual_seed(0)
    tensors = {s.name: torch.randn(s.shape, generator=generator) for s in sorted(specs, key=lambda s: s.name)}
    return Target(sparsity, weight=tensors.__getitem__, score=tensors.__getitem__, **options)


@policy
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.97, 0.999])
def test_counts_fit_and_do_not_depend_on_the_order(policy, specs, sparsity):
    goal = target(specs, sparsity)
    counts = policy(specs, goal)
    assert all(1 <= counts[s.name] <= s.numel for s in specs)
    assert sum(counts.values()) <= goal.free_total(specs)
    if policy is not POLICIES["er_unrolled"] or sparsity > 0.95:
        assert sum(counts.values()) == goal.free_total(specs)
    for seed in range(5):
        shuffled = random.Random(seed).sample(specs, len(specs))
        assert policy(shuffled, goal) == counts


@policy
def test_forced_counts_are_kept(policy, specs):
    counts = policy(specs, target(specs, 0.9, forced={"stem": 0.0, "head": 17}))
    assert (counts["stem"], counts["head"]) == (432, 17)


@policy
def test_an_infeasible_total_is_refused(policy, specs):
    with pytest.raises(PlanError, match="4 weights; expected 4"):
        policy(specs, target(specs, 0.9999))


@policy
def test_no_weights_is_no_counts(policy):
    assert policy([], Target(0.9)) == {}


def test_names_and_tables_resolve():
    assert resolve("erk") is POLICIES["erk"]
    assert resolve({"head": 0.5}) == Explicit({"head": 0.5})
    check("global_magnitude")


@pytest.mark.parametrize("wrong", ["ERK", None, 0.9])
def test_an_unknown_policy_lists_the_known_ones(wrong):
    with pytest.raises(
        PlanError,
        match=r"expected uniform, er, erk, er_unrolled, global_magnitude, global_score or {glob: sparsity}",
    ):
        check(wrong)
