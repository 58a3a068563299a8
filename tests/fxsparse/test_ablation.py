"""SRigL's rule against tables worked out by hand and its definition in lists; what the published codes got wrong."""

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxsparse.ablation import AblateAndGrow, salience_threshold, salient_enough, srigl_fan_in, trim
from fxsparse.method import WeightView
from fxsparse.pattern import ConstantFanIn
from fxsparse.rng import generator_for


def view(weight, active, gradient, fraction, budget, *, ablates=True, rows=1, step=0):
    positions = torch.tensor(sorted(active), dtype=torch.int64)
    matrix = gradient.reshape(len(gradient), -1)
    return WeightView(
        name="w",
        shape=tuple(weight.shape),
        pattern=ConstantFanIn(),
        nnz=budget // len(weight) * len(weight),
        budget=budget,
        step=step,
        drop_fraction=fraction,
        active=positions,
        values=weight.flatten()[positions],
        weight=lambda: pytest.fail("read the whole weight"),
        gradient_tiles=lambda: ((i, matrix[i : i + rows]) for i in range(0, len(matrix), rows)),
        gradient_at=lambda positions: matrix.flatten()[positions],
        marginals=lambda signs: None,
        generator=generator_for(0, "w", step),
        ablates=ablates,
    )


# Four neurons of four inputs; * marks the active entries.
#   flat     0    1    2    3  |  4    5    6    7  |  8    9   10   11  | 12   13   14   15
#   |w|     .9*  .8*   -    -  | .7*  .1*   -    -  | .2* .05*   -    -  | .6*  .5*   -    -
#   |g|      0    0   .8   .1  |  0    0   .9   .2  |  0    1.   .3   .4 |  0    0   .1   .7
WEIGHT = torch.tensor([[0.9, -0.8, 0, 0], [-0.7, 0.1, 0, 0], [0.2, 0.05, 0, 0], [0.6, 0.5, 0, 0]])
GRADIENT = torch.tensor([[0, 0, -0.8, 0.1], [0, 0, 0.9, 0.2], [0, 1.0, 0.3, 0.4], [0, 0, 0.1, -0.7]])
ACTIVE = [0, 1, 4, 5, 8, 9, 12, 13]
TWO = AblateAndGrow(gamma_sal=2)


@pytest.mark.parametrize(
    ("rule", "fraction", "budget", "expected"),
    [
        # 6 of 8 stay: .9 .8 .7 .6 .5 .2; the 2 largest gradients of pruned entries are 6 and 2.  Salient: 3, 2, 1, 2.
        # Neuron 2 goes.  All 6 of the others are kept; 9 // 3 = 3 a neuron, grown at 2, 6 and 15.
        (TWO, 0.25, 9, [0, 1, 2, 4, 5, 6, 12, 13, 15]),
        # 8 // 3 = 2: nothing to grow.
        (TWO, 0.25, 8, [0, 1, 4, 5, 12, 13]),
        # 5 of 8 stay, 3 gradients count (6, 2, 15): salient 3, 2, 0, 3.  Of the others' weights .1 is dropped as well.
        (TWO, 0.375, 9, [0, 1, 2, 4, 6, 7, 12, 13, 15]),
        # The authors' code ranks 9, which is active, first: neuron 2 has 2 salient entries and stays; 6 and 9 // 4 = 2.
        # .2 of neuron 2 is kept, .1 and .05 are dropped: neuron 1 grows at 6 and neuron 2 at 9, which keeps its value.
        (replace(TWO, authors_code=True), 0.25, 9, [0, 1, 4, 6, 8, 9, 12, 13]),
        # A threshold of 1 ablates nobody: .1 and .05 are dropped, neuron 1 grows at 6, neuron 2 at 9.
        (AblateAndGrow(gamma_sal=0.3), 0.25, 9, [0, 1, 4, 6, 8, 9, 12, 13]),
        # No drop: 8 of 8 are salient, every neuron holds 2.
        (TWO, 0.0, 8, ACTIVE),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_table_worked_out_by_hand(rule, fraction, budget, expected, rows):
    assert rule(view(WEIGHT, ACTIVE, GRADIENT, fraction, budget, rows=rows)).tolist() == expected


def test_a_weight_that_does_not_ablate_keeps_its_fan_in():
    # .1 and .05 are dropped; of the rest of neuron 1 the largest gradient is at 6, of neuron 2 at 9.
    chosen = TWO(view(WEIGHT, ACTIVE, GRADIENT, 0.25, 9, ablates=False))
    assert chosen.tolist() == [0, 1, 4, 6, 8, 9, 12, 13]


def test_an_ablated_neuron_comes_back_where_its_gradients_are_salient():
    # Neuron 2 is ablated, fan-in 9 // 3 = 3; 3 of 9 are to go.
    active = [0, 1, 2, 4, 5, 6, 12, 13, 15]
    weight = torch.tensor([[9.0, 8, 3, 0], [7, 4, 2, 0], [0, 0, 0, 0], [6, 5, 1, 0]])
    gradient = torch.zeros(4, 4)
    gradient[2, 1], gradient[2, 3], gradient[0, 3] = 3.0, 2.0, 1.0
    back = TWO(view(weight, active, gradient, 0.34, 9))
    # Kept are 9 8 7 6 5 4; 9 // 4 = 2 a neuron.
    assert back.tolist() == [0, 1, 4, 5, 9, 11, 12, 13]
    gradient[2] = 0
    assert TWO(view(weight, active, gradient, 0.34, 9)).tolist() == [0, 1, 3, 4, 5, 6, 12, 13, 14]


def by_lists(weight, active, gradient, fraction, budget, neurons, gamma, ablates):
    """The steps of the paper on plain lists."""
    columns = len(weight) // neurons
    keep = len(active) - int(len(active) * fraction)
    salient = sorted(active, key=lambda i: (-abs(weight[i]), i))[:keep]
    pruned = sorted(set(range(len(weight))) - set(active), key=lambda i: (-abs(gradient[i]), i))
    salient += pruned[: len(active) - keep]
    counts = [sum(i // columns == n for i in salient) for n in range(neurons)]
    least = budget // columns
    left = list(range(neurons))
    if ablates and least < neurons:
        initial = budget // neurons
        threshold = int(gamma) if gamma >= 1 else max(1, int(gamma * initial))
        threshold = min(threshold, sorted(counts, reverse=True)[least])
        left = [n for n in range(neurons) if counts[n] >= threshold]
    fan_in = min(budget // len(left), columns)
    mine = [i for i in active if i // columns in left]
    kept = sorted(mine, key=lambda i: (-abs(weight[i]), i))[:keep]
    chosen = []
    for n in left:
        row = sorted((i for i in kept if i // columns == n), key=lambda i: (-abs(weight[i]), i))[:fan_in]
        free = sorted(
            set(range(n * columns, (n + 1) * columns)) - set(row), key=lambda i: (-abs(gradient[i]), i)
        )
        chosen += row + free[: fan_in - len(row)]
    return sorted(chosen)


few = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])


@given(st.data(), st.integers(1, 6), st.integers(1, 10), st.floats(0, 1), st.integers(1, 6), st.booleans())
def test_the_rule_equals_its_definition_with_ties_at_any_tiling(
    data, neurons, columns, fraction, height, ablates
):
    numel = neurons * columns
    weight = data.draw(st.lists(few, min_size=numel, max_size=numel))
    gradient = data.draw(st.lists(few, min_size=numel, max_size=numel))
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    budget = data.draw(st.integers(neurons, numel))
    gamma = data.draw(st.sampled_from([0.05, 0.3, 0.95, 1, 2, 5]))
    shaped, slopes = (torch.tensor(numbers).view(neurons, columns) for numbers in (weight, gradient))
    seen = view(shaped, active, slopes, fraction, budget, ablates=ablates, rows=height)
    chosen = AblateAndGrow(gamma)(seen)
    assert chosen.tolist() == by_lists(weight, active, gradient, fraction, budget, neurons, gamma, ablates)
    authors = AblateAndGrow(gamma, authors_code=True)
    whole = view(shaped, active, slopes, fraction, budget, ablates=ablates, rows=neurons)
    assert torch.equal(authors(seen), authors(replace(whole, generator=generator_for(0, "w", 0))))


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 1), st.integers(0, 2**31), st.booleans())
def test_fan_in_is_the_budget_over_the_neurons_left_for_any_ablation(neurons, columns, share, seed, authors):
    budget = neurons + int(share * neurons * (columns - 1))
    generator = torch.Generator().manual_seed(seed)
    shape = (neurons, columns)
    weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    active = torch.randperm(neurons * columns, generator=generator)[:budget].tolist()
    rule = AblateAndGrow(0.95, authors_code=authors)
    chosen = rule(view(weight, active, gradient, 0.3, budget))
    counts = torch.bincount(chosen // columns, minlength=neurons)
    left = int((counts > 0).sum())
    assert set(counts[counts > 0].tolist()) == {min(budget // left, columns)}
    assert len(chosen) == left * srigl_fan_in(budget, left, columns) <= budget
    assert left > budget // columns or left == neurons


@pytest.mark.parametrize(
    ("budget", "active", "in_features", "expected"),
    [
        (235_929, 318, 3072, 741),  # the paper's layer: mlp.3 of ViT-B/16's last block at 90 %
        (235_929, 768, 3072, 307),
        (235_929, 1145, 768, 206),
        (58_982, 768, 768, 76),
        (10, 1, 4, 4),
    ],
)
def test_fan_in(budget, active, in_features, expected):
    assert srigl_fan_in(budget, active, in_features) == expected


def test_the_threshold_is_a_share_of_the_initial_fan_in_or_a_count():
    assert [salience_threshold(gamma, 10) for gamma in (0.3, 0.35, 0.95, 1, 7)] == [3, 3, 9, 1, 7]
    assert salience_threshold(0.3, 3) == 1  # int(0.9) would let every neuron stay


def test_a_neuron_at_the_threshold_stays():
    assert salient_enough(torch.tensor([3, 2, 1]), threshold=2, least=0).tolist() == [True, True, False]


def test_the_threshold_gives_way_where_too_few_neurons_could_hold_the_budget():
    # Two neurons could not hold more than 2 x columns, so a third has to stay: at 1 two of them do.
    salient = torch.tensor([5, 1, 0, 4, 1])
    assert salient_enough(salient, threshold=3, least=2).tolist() == [True, True, False, True, True]
    assert salient_enough(salient, threshold=3, least=1).tolist() == [True, False, False, True, False]


def test_a_neuron_above_the_fan_in_keeps_its_largest_weights():
    kept, score = torch.tensor([0, 1, 2, 3, 8, 9]), torch.tensor([10.76, 12.82, 12.04, 12.31, 1.0, 2.0])
    assert trim(kept, score, columns=4, fan_in=2).tolist() == [1, 3, 8, 9]
    assert trim(kept, score, columns=4, fan_in=4) is kept
    tied = torch.ones(6)
    assert trim(kept, tied, columns=4, fan_in=2).tolist() == [0, 1, 8, 9]


def test_the_authors_code_trims_to_any_of_them_and_repeats_at_the_same_step():
    weight = torch.zeros(4, 64)
    weight[0] = torch.arange(64) + 1.0
    gradient, active = torch.ones(4, 64), range(64)
    rule, paper = AblateAndGrow(0.3, authors_code=True), AblateAndGrow(0.3)

    def first_row(rule, step):
        chosen = rule(view(weight, active, gradient, 0.0, 64, ablates=False, step=step))
        return chosen[chosen < 64].tolist()

    assert first_row(paper, 0) == list(range(48, 64))
    assert first_row(rule, 0) == first_row(rule, 0)
    assert first_row(rule, 0) != first_row(rule, 1)
    assert len(first_row(rule, 0)) == 16


def test_pruned_zeros_fill_up_in_the_authors_code_alone():
    weight = torch.tensor([[5.0, 4, 3, 0, 0, 0], [0.5, 0.4, 0, 0, 0, 0]])
    gradient = torch.tensor([[0.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 9.0]])
    rule = AblateAndGrow(3)
    # Neuron 1 goes, with 2 of the 5 weights: the kept 3 (4 // 1 = 4 a neuron) leave one place for a gradient.
    seen = view(weight, [0, 1, 2, 6, 7], gradient + torch.tensor([0.0, 0, 0, 0, 0, 1]), 0.0, 4)
    assert rule(seen).tolist() == [0, 1, 2, 5]
    # The authors' code keeps 5 entries of neuron 0, two of them pruned zeros at 3 and 4, and trims to any 4 of them.
    assert 5 not in replace(rule, authors_code=True)(seen).tolist()


def test_an_active_weight_of_exactly_zero_and_a_row_that_sums_to_zero_are_weights_like_others():
    weight = torch.tensor([[1.0, -1.0, 0], [0.0, 2.0, 0], [1.0, 1.0, 0]])
    chosen = AblateAndGrow(1)(view(weight, [0, 1, 3, 4, 6, 7], torch.zeros(3, 3), 0.0, 6))
    assert chosen.tolist() == [0, 1, 3, 4, 6, 7]


def test_a_dense_budget_ablates_nobody():
    weight = torch.randn(5, 3)
    chosen = AblateAndGrow(100)(view(weight, range(15), torch.randn(5, 3), 0.3, 15))
    assert chosen.tolist() == list(range(15))


def test_convolutions_count_every_kernel_position_as_an_input():
    weight, gradient = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    active = [n * 36 + i for n in range(6) for i in range(5)]
    chosen = AblateAndGrow(3)(view(weight, active, gradient, 0.3, 35))
    left = torch.bincount(chosen // prod(weight.shape[1:]), minlength=6)
    assert set(left[left > 0].tolist()) == {35 // int((left > 0).sum())}
