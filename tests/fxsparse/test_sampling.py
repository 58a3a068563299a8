"""GSE's rule: Algorithm 2 worked out by hand, its distributions, and what it never does."""

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fxsparse.errors import NumericsError
from fxsparse.method import JointRule, Probe, Proposal, SampledRule
from fxsparse.methods import gse, rigl
from fxsparse.observed import Observed, marginals
from fxsparse.pattern import Unstructured
from fxsparse.rng import generator_for
from fxsparse.sampling import (
    SAMPLINGS,
    SampleAndGrow,
    SampleAndGrowJointly,
    exchange,
    four_wise_signs,
    inactive,
    polynomial_hash,
    up,
)
from fxsparse.selection import MaskChange, to_mask
from fxsparse.testing import view_of
from fxsparse.topk import top_positions


def view(weight, mask, gradient, method=None, step=1000, seen=None):
    made = view_of(method or gse(), Unstructured(), weight, mask, gradient, int(mask.sum()), step)
    if seen is None:
        return made
    return replace(made, marginals=lambda signs: marginals(seen, tuple(weight.shape), signs))


def proposal(active, keep, candidates, grow, name="w"):
    return Proposal(
        name, torch.tensor(active), torch.tensor(keep), torch.tensor(candidates), torch.tensor(grow)
    )


def test_algorithm_2_by_hand():
    # A layer of 2 x 4 with |A| = 4, drop fraction 0.3: k = min(ceil(1.2), |S|) = 2.
    weight = torch.tensor([[0.5, -0.1, 0.0, 0.0], [0.0, 0.2, -2.0, 0.0]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    gradient = torch.tensor([[9.0, 9.0, -0.3, 0.1], [0.7, 9.0, 9.0, -0.9]])
    drawn = torch.tensor([7, 3, 7, 1, 2, 6])  # 7 twice, 1 and 6 are active; 4 was not drawn
    candidates = inactive(drawn, torch.tensor([0, 1, 5, 6]))
    assert candidates.tolist() == [2, 3, 7]
    made = view(weight, mask, gradient)
    found = Proposal("w", made.active, made.values.abs(), candidates, made.gradient_at(candidates).abs())
    # G = the largest of {2: 0.3, 3: 0.1, 7: 0.9}; P = the smallest of {0: 0.5, 1: 0.1, 5: 0.2, 6: 2}.
    assert exchange([found], 0.3)[0].tolist() == [0, 2, 6, 7]


def test_fewer_candidates_than_are_to_go_limit_both():
    few = proposal([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], [5], [0.0])
    assert exchange([few], 1.0)[0].tolist() == [0, 1, 2, 5]
    none = proposal([0, 1], [1.0, 2.0], [], [])
    assert exchange([none], 1.0)[0].tolist() == [0, 1]
    assert exchange([], 0.5) == []


def test_all_layers_together_move_entries_to_the_larger_gradients():
    one = proposal([0, 1, 2], [0.1, 0.2, 5.0], [4, 5], [0.3, 0.2], "one")
    two = proposal([0, 3], [0.3, 4.0], [1, 2], [0.9, 0.8], "two")
    chosen = SampleAndGrowJointly(SampleAndGrow()).choose([one, two], 0.5)  # k = ceil(2.5)
    assert [positions.tolist() for positions in chosen] == [[2, 4], [1, 2, 3]]
    assert sum(map(len, chosen)) == 5


def test_which_rules_are_joint_and_what_they_ask_for():
    assert not isinstance(SampleAndGrow(), JointRule)
    assert isinstance(SampleAndGrowJointly(SampleAndGrow()), JointRule)
    assert not isinstance(rigl().rule, SampledRule)
    for rule in (SampleAndGrow(2.0), SampleAndGrowJointly(SampleAndGrow(2.0))):
        assert isinstance(rule, SampledRule)
        assert (rule.candidates, rule.probe) == (2.0, Probe.SAMPLED)
    assert {SampleAndGrow(1.0, name).probe for name in ("grabo", "graest")} == {Probe.GUIDED}


def test_counts_are_rounded_up_from_what_was_meant():
    assert [up(0.1 * 30), up(1.2), up(0.7 * 10), up(0.0), up(3.0000001)] == [3, 2, 7, 0, 4]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drop_fraction", [0.1, 0.5])
def test_with_many_samples_it_grows_what_the_dense_gradient_says(sampling, drop_fraction):
    shape = (12, 17)
    weight, gradient = torch.randn(shape), torch.randn(shape)
    mask = torch.rand(shape) < 0.3
    method = gse(gamma=400.0, sampling=sampling, drop_fraction=drop_fraction, decay="constant")
    made = view(weight * mask, mask, gradient, method)
    new = method.rule(made)
    count = up(drop_fraction * int(mask.sum()))
    change = MaskChange.between(made.active, new)
    assert (
        change.grown.tolist() == top_positions(gradient.abs().masked_fill(mask, -torch.inf), count).tolist()
    )
    smallest = top_positions(-(weight.abs().masked_fill(~mask, torch.inf)), count)
    assert change.pruned.tolist() == smallest.tolist()


def test_with_many_samples_it_is_rigl_where_that_regrows_nothing():
    shape = (8, 20)
    mask = torch.rand(shape) < 0.25
    weight, gradient = torch.randn(shape) * mask, torch.randn(shape) * ~mask
    nnz, fraction = int(mask.sum()), 4 / int(mask.sum())
    ours, dense = (
        build(drop_fraction=fraction, decay="constant", **o)
        for build, o in ((gse, {"gamma": 400.0}), (rigl, {}))
    )
    expected = dense.rule(view_of(dense, Unstructured(), weight, mask, gradient, nnz, 1000))
    chosen = ours.rule(view(weight, mask, gradient, ours))
    if int(nnz * fraction) == 4:
        assert torch.equal(chosen, expected)
    assert len(chosen) == nnz


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("density", [0.02, 0.3, 0.95, 1.0])
def test_updates_keep_the_count_and_grown_and_pruned_apart(sampling, density):
    shape, method = (9, 14), gse(every=1, stop=10**6, sampling=sampling, drop_fraction=0.4)
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=random) < density
    mask[0, 0] = True
    nnz = int(mask.sum())
    weight = torch.randn(shape, generator=random)
    for step in range(1, 101):
        weight = (weight + 0.1 * torch.randn(shape, generator=random)) * mask
        gradient = torch.randn(shape, generator=random)
        made = view(weight, mask, gradient, method, step)
        candidates = method.rule.propose(made).candidates
        assert not mask.flatten()[candidates].any()
        assert (candidates.diff() > 0).all()
        assert len(candidates) <= nnz
        new = method.rule(view(weight, mask, gradient, method, step))
        change = MaskChange.between(made.active, new)
        assert len(new) == nnz
        assert (
            len(change.grown)
            == len(change.pruned)
            == min(
                up(0.4 * nnz * (1 + torch.cos(torch.tensor(torch.pi * step / 10**6)).item()) / 2),
                len(candidates),
            )
        )
        mask = to_mask(new, shape)


def test_share_of_useful_samples():
    # Theory for gamma = 1: distinct (1 - e^-d) / d of the samples, of which 1 - d are not active.
    density, shape = 0.086, (400, 500)
    mask = torch.rand(shape) < density
    made = view(torch.randn(shape) * mask, mask, torch.randn(shape))
    drawn = SAMPLINGS["uniform"](made, len(made.active))
    distinct = len(drawn.unique()) / len(drawn)
    d = torch.tensor(density)
    assert distinct == pytest.approx(((1 - torch.exp(-d)) / d).item(), abs=0.01)
    assert len(inactive(drawn, made.active)) / len(drawn.unique()) == pytest.approx(1 - density, abs=0.01)


def frequencies(sampling, seen, shape, count=200_000):
    made = view(
        torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape), gse(sampling=sampling), seen=seen
    )
    drawn = SAMPLINGS[sampling](made, count)
    return torch.bincount(drawn, minlength=torch.Size(shape).numel()).view(shape[0], -1) / count


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), zeros=st.booleans())
def test_grabo_draws_by_magnitude_of_inputs_and_output_gradients(seed, zeros):
    torch.manual_seed(seed)
    x, grad = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    if zeros:
        x[:, 1] = grad[:, 3] = 0
    f, g = x.abs().sum(0) / x.abs().sum(), grad.abs().sum(0) / grad.abs().sum()
    found = frequencies("grabo", [Observed(x[:3], grad[:3]), Observed(x[3:], grad[3:])], (4, 5))
    torch.testing.assert_close(found.double(), g[:, None] * f, atol=0.006, rtol=0)
    if zeros:
        assert not found[:, 1].any()
        assert not found[3].any()


def test_grabo_is_exact_for_a_batch_of_one_and_a_bound_for_more():
    x, grad = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for batch in (1, 6):
        columns, rows = marginals([Observed(x[:batch], grad[:batch])], (4, 5))
        gradient = (grad[:batch].t() @ x[:batch]).abs()
        bound = rows[:, None] * columns
        assert (bound >= gradient - 1e-12).all()
        assert torch.allclose(bound, gradient) is (batch == 1)


def test_graest_draws_by_the_signed_sums_with_signs_of_its_own_generator():
    x, grad = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    coefficients = torch.randint(2**31 - 1, (4,), generator=generator_for(0, "w", 1000)).tolist()
    signs = four_wise_signs(torch.arange(7), coefficients)
    f, g = (signs @ x).abs(), (signs @ grad).abs()
    found = frequencies("graest", [Observed(x, grad)], (4, 5))
    torch.testing.assert_close(found.double(), (g / g.sum())[:, None] * (f / f.sum()), atol=0.006, rtol=0)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000))
def test_graest_estimates_the_gradient_without_bias(seed):
    torch.manual_seed(seed)
    x, grad = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    exact = grad.t() @ x
    # Over all sign vectors; of fair and pairwise independent ones the mean is the same.
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=5)), dtype=torch.float64)
    estimates = (signs @ grad)[:, :, None] * (signs @ x)[:, None]
    torch.testing.assert_close(estimates.mean(0), exact)
    draws = [four_wise_signs(torch.arange(5), torch.randint(2**31 - 1, (4,)).tolist()) for _ in range(3000)]
    signs = torch.stack(draws)
    estimates = (signs @ grad)[:, :, None] * (signs @ x)[:, None]
    error = (estimates.mean(0) - exact).abs() / (estimates.std(0) / 3000**0.5 + 1e-12)
    assert error.max() < 5  # standard errors


def test_the_hash_is_four_wise_independent_exactly():
    prime, terms = 5, torch.arange(5)
    values = torch.stack(
        [polynomial_hash(terms, c, prime) for c in itertools.product(range(prime), repeat=4)]
    )
    for four in itertools.combinations(range(prime), 4):
        codes = values[:, list(four)] @ torch.tensor([1, 5, 25, 125])
        assert torch.bincount(codes, minlength=625).tolist() == [1] * 625


def test_the_hash_does_not_overflow():
    terms, coefficients = torch.tensor([2**31 - 2, 12345]), [2**31 - 2, 2**31 - 3, 7, 11]
    expected = []
    for term in terms.tolist():
        value = 0
        for coefficient in coefficients:
            value = (value * term + coefficient) % (2**31 - 1)
        expected.append(value)
    assert polynomial_hash(terms, coefficients, 2**31 - 1).tolist() == expected
    assert four_wise_signs(terms, coefficients).tolist() == [1 - 2 * (value & 1) for value in expected]


def test_grouped_convolutions_draw_inputs_of_the_outputs_own_group():
    rows, columns = torch.tensor([1.0, 0, 2, 0]), torch.tensor([[1.0, 0, 3], [0, 5, 0]])
    shape = (4, 3)
    made = replace(
        view(torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape), gse(sampling="grabo")),
        marginals=lambda signs: (columns, rows),
    )
    found = torch.bincount(SAMPLINGS["grabo"](made, 60_000), minlength=12).view(shape) / 60_000
    expected = torch.tensor([[1 / 12, 0, 3 / 12], [0, 0, 0], [0, 2 / 3, 0], [0, 0, 0]])
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    assert torch.equal(found > 0, expected > 0)


def test_what_was_not_seen_or_was_dead_is_sampled_uniformly():
    shape = (3, 4)
    made = view(torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape), gse(sampling="grabo"))
    for sums in (None, (torch.zeros(1, 4), torch.zeros(3))):
        again = replace(
            made, marginals=lambda signs, sums=sums: sums, generator=torch.Generator().manual_seed(1)
        )
        found = torch.bincount(SAMPLINGS["grabo"](again, 60_000), minlength=12) / 60_000
        torch.testing.assert_close(found, torch.full((12,), 1 / 12), atol=0.005, rtol=0)


def test_diverged_inputs_are_named():
    shape = (3, 4)
    made = view(torch.zeros(shape), torch.zeros(shape).bool(), torch.zeros(shape), gse(sampling="grabo"))
    broken = replace(made, marginals=lambda signs: (torch.full((1, 4), torch.nan), torch.ones(3)))
    with pytest.raises(NumericsError, match="'w': expected finite inputs and output gradients"):
        SAMPLINGS["grabo"](broken, 5)
