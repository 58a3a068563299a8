from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import NumericsError
from fxsparse.method import Probe, WeightView, WholeRule
from fxsparse.pattern import NM, Block, ConstantFanIn, Pattern, Strided, Unstructured
from fxsparse.rng import generator_for
from fxsparse.rules import GradientMagnitude, LargestMagnitude, PruneGrow, UniformRandom, magnitudes
from fxsparse.selection import MaskChange, to_positions

RIGL = PruneGrow(GradientMagnitude())
SET = PruneGrow(UniformRandom())
ANY = Unstructured()


def view(
    weight: torch.Tensor,
    active: list[int],
    gradient: torch.Tensor,
    fraction: float,
    pattern: Pattern = ANY,
    step: int = 0,
    rows: int = 1,
) -> WeightView:
    matrix = gradient.reshape(len(gradient), -1)
    positions = torch.tensor(active, dtype=torch.int64)
    return WeightView(
        name="w",
        shape=tuple(weight.shape),
        pattern=pattern,
        nnz=len(active),
        budget=len(active),
        step=step,
        drop_fraction=fraction,
        active=positions,
        values=weight.flatten()[positions],
        weight=lambda: weight,
        gradient_tiles=lambda: ((i, matrix[i : i + rows]) for i in range(0, len(matrix), rows)),
        gradient_at=lambda positions: matrix.flatten()[positions],
        marginals=lambda signs: None,
        generator=generator_for(0, "w", step),
    )


# Two rows of four; * marks the active entries.
#   flat     0     1     2     3     4     5     6     7
#   |w|     .9*    -    .1*   .5*    -    .3*    -    .7*
#   |g|     .1    .2    .9    .3    .8    .4    .6    .5
WEIGHT = torch.tensor([[0.9, 0.0, -0.1, 0.5], [0.0, -0.3, 0.0, 0.7]])
ACTIVE = [0, 2, 3, 5, 7]
GRADIENT = torch.tensor([[0.1, -0.2, 0.9, 0.3], [-0.8, 0.4, 0.6, -0.5]])


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, [0, 2, 3, 5, 7]),
        (0.19, [0, 2, 3, 5, 7]),  # int(0.95) = 0 entries drop
        (0.2, [0, 2, 3, 5, 7]),  # 2 drops, and has the largest gradient of {1, 2, 4, 6}: regrown
        (0.4, [0, 2, 3, 4, 7]),  # 2 and 5 drop; of {1, 2, 4, 5, 6} the largest gradients are 2 and 4
        (0.5, [0, 2, 3, 4, 7]),  # int(2.5) = 2: the same
        (0.8, [0, 2, 4, 6, 7]),  # only 0 stays; then 2 (.9), 4 (.8), 6 (.6), 7 (.5)
        (1.0, [2, 4, 5, 6, 7]),  # the five largest gradients
    ],
)
def test_rigl_by_hand(fraction, expected):
    assert RIGL(view(WEIGHT, ACTIVE, GRADIENT, fraction)).tolist() == expected


def test_an_entry_dropped_and_regrown_counts_as_kept():
    chosen = RIGL(view(WEIGHT, ACTIVE, GRADIENT, 0.4))
    change = MaskChange.between(torch.tensor(ACTIVE), chosen)
    assert change.kept.tolist() == [0, 2, 3, 7]
    assert change.pruned.tolist() == [5]
    assert change.grown.tolist() == [4]


def test_constant_fan_in_drops_over_the_layer_and_refills_every_row():
    # The two smallest weights are both in row 1, which alone regrows, though row 0's gradients are larger.
    weight = torch.tensor([[0.9, 0.8, 0.0, 0.0], [0.1, 0.2, 0.0, 0.0]])
    gradient = torch.tensor([[1.0, 1.0, 0.9, 0.8], [0.1, 0.2, 0.3, 0.4]])
    active = [0, 1, 4, 5]
    assert RIGL(view(weight, active, gradient, 0.5, ConstantFanIn())).tolist() == [0, 1, 6, 7]
    assert RIGL(view(weight, active, gradient, 0.5, Unstructured())).tolist() == [0, 1, 2, 3]


def test_nm_refills_every_group():
    # Groups {0, 1}, {2, 3}: 1 of 2 each.  Entry 0 (the smaller) drops and its group regrows 1.
    weight = torch.tensor([[0.1, 0.0, 0.9, 0.0]])
    gradient = torch.tensor([[0.1, 0.2, 0.0, 5.0]])
    assert RIGL(view(weight, [0, 2], gradient, 0.5, NM(1, 2))).tolist() == [1, 2]


def test_strided_refills_every_group():
    # Groups {0, 2}, {1, 3}: entry 0 (the smaller) drops, and its group regrows 2, though 3 has the largest gradient.
    weight = torch.tensor([[0.1, 0.9, 0.0, 0.0]])
    gradient = torch.tensor([[0.1, 0.0, 0.2, 5.0]])
    assert RIGL(view(weight, [0, 1], gradient, 0.5, Strided(2))).tolist() == [1, 2]


def test_blocks_drop_whole_and_at_least_the_asked_number():
    # Four blocks of 1 x 2, three active with |w| sums 2, 4, 6; int(6 * 0.4) = 2 entries: the first block.
    weight = torch.tensor([[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 9.0, 9.0], [9.0, 9.0, 1.0, 0.0]])
    block = Block(1, 2)
    active = [0, 1, 2, 3, 4, 5]
    assert RIGL(view(weight, active, gradient, 0.4, block)).tolist() == [2, 3, 4, 5, 6, 7]
    # int(6 * 0.5) = 3 entries: two blocks drop (sums 2 and 4); the one at 2 regrows by 18, the last by 1.
    assert RIGL(view(weight, active, gradient, 0.5, block)).tolist() == [2, 3, 4, 5, 6, 7]


def test_all_equal_scores_keep_the_count_and_take_the_lowest_index():
    # Equal weights: the last 2 of 4 drop.  Equal gradients: the first 2 that are free come in.
    ones, zeros = torch.ones(2, 4), torch.zeros(2, 4)
    assert RIGL(view(ones, [1, 3, 5, 7], zeros, 0.5)).tolist() == [0, 1, 2, 3]


def test_zeros_among_the_active_entries_do_not_let_inactive_ones_in():
    # Freshly grown weights are 0 as inactive ones are; 3 of 4 are kept, all of them from the active set.
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    gradient = torch.tensor([[0.0] * 4, [0.0, 0.0, 0.0, 1.0]])
    assert RIGL(view(weight, [2, 3, 5, 6], gradient, 0.25)).tolist() == [2, 3, 5, 7]


def test_an_infinite_gradient_is_grown_and_displaces_nothing_kept():
    gradient = torch.full((2, 4), torch.inf)
    chosen = RIGL(view(WEIGHT, ACTIVE, gradient, 0.4)).tolist()
    assert {0, 3, 7} <= set(chosen)
    assert chosen == [0, 1, 2, 3, 7]


def test_nan_gradients_are_refused():
    with pytest.raises(NumericsError, match="1 NaN among"):
        RIGL(view(WEIGHT, ACTIVE, GRADIENT.where(GRADIENT != 0.6, torch.nan), 0.4))


def test_a_smaller_target_prunes_down_to_it():
    chosen = RIGL(
        WeightView(**{**vars(view(WEIGHT, ACTIVE, GRADIENT, 0.0)), "nnz": 3}),
    )
    assert chosen.tolist() == [0, 3, 7]


def rigl_by_sorting(weight, active, gradient, fraction):
    """Section 1.2 of the rule, by sorted lists: drop among active, then grow among all that is not kept."""
    drop = int(len(active) * fraction)
    kept = sorted(active, key=lambda i: (-abs(weight[i]), i))[: len(active) - drop]
    free = sorted((i for i in range(len(weight)) if i not in kept), key=lambda i: (-abs(gradient[i]), i))
    return sorted(kept + free[:drop])


few = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.floats(0, 1), st.integers(1, 5))
def test_rigl_equals_its_definition_with_ties_at_any_tiling(data, rows, columns, fraction, height):
    numel = rows * columns
    weight = data.draw(st.lists(few, min_size=numel, max_size=numel))
    gradient = data.draw(st.lists(few, min_size=numel, max_size=numel))
    active = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    shaped = torch.tensor(weight).view(rows, columns)
    chosen = RIGL(view(shaped, active, torch.tensor(gradient).view(rows, columns), fraction, rows=height))
    assert chosen.tolist() == rigl_by_sorting(weight, active, gradient, fraction)


def test_random_growth_reads_no_gradient_and_repeats_at_the_same_step():
    def choose(step):
        seen = view(WEIGHT, ACTIVE, GRADIENT, 0.4, step=step)
        return SET(
            WeightView(**{**vars(seen), "gradient_tiles": lambda: pytest.fail("read the gradient")})
        ).tolist()

    assert choose(3) == choose(3)
    for step in range(20):
        assert {0, 3, 7} <= set(choose(step))
        assert len(choose(step)) == 5
    assert len({tuple(choose(step)) for step in range(20)}) > 1


def test_random_growth_reaches_every_free_entry_about_equally():
    # 2 of the 5 free entries {1, 2, 4, 5, 6} grow: 400 of 1,000 times each, standard deviation 15.5.
    counts = dict.fromkeys([1, 2, 4, 5, 6], 0)
    for step in range(1000):
        for entry in set(SET(view(WEIGHT, ACTIVE, GRADIENT, 0.4, step=step)).tolist()) - {0, 3, 7}:
            counts[entry] += 1
    assert all(abs(count - 400) < 5 * 15.5 for count in counts.values()), counts


def test_largest_magnitude_sees_hidden_values():
    hidden = torch.tensor([[0.9, -2.0, 0.1, 0.5], [0.0, -0.3, 0.0, 0.7]])
    seen = view(hidden, ACTIVE, GRADIENT, 0.0)
    assert LargestMagnitude()(seen).tolist() == [0, 1, 3, 5, 7]
    assert to_positions(LargestMagnitude().mask(hidden, ANY, 5)).tolist() == [0, 1, 3, 5, 7]


def test_only_a_rule_that_reads_the_weight_alone_gives_a_mask():
    assert isinstance(LargestMagnitude(), WholeRule)
    assert not isinstance(RIGL, WholeRule)


def test_rules_declare_their_probe():
    assert (RIGL.probe, SET.probe, LargestMagnitude().probe) == (Probe.DENSE, Probe.NONE, Probe.NONE)


def test_random_growth_is_uniform_over_what_is_not_kept_and_may_take_back_what_was_dropped():
    weight, seen = torch.tensor([[0.9, 0.0, 0.1, 0.0], [0.0, 0.5, 0.0, 0.0]]), Counter()
    for step in range(3000):
        # 2 drops; one of the six that are not kept comes in
        (grown,) = set(SET(view(weight, [0, 2, 5], weight, 0.34, step=step)).tolist()) - {0, 5}
        seen[grown] += 1
    assert set(seen) == {1, 2, 3, 4, 6, 7}
    assert all(400 < count < 600 for count in seen.values())  # 500 expected, standard deviation 20


def test_random_growth_of_an_unstructured_mask_costs_what_its_entries_cost():
    # A score for each of the 2 ** 40 entries would need terabytes.
    side, active = 2**20, torch.arange(0, 2**40, 2**30)
    values = torch.arange(1.0, len(active) + 1)
    wide = replace(
        view(torch.ones(1, 1), [0], torch.ones(1, 1), 0.5),
        shape=(side, side),
        nnz=len(active),
        active=active,
        values=values,
    )
    chosen = SET(wide)
    assert len(chosen) == len(active)
    assert set(active[len(active) // 2 :].tolist()) <= set(chosen.tolist()), "the larger half stays"
    assert int(chosen.diff().min()) > 0


def test_magnitudes_stand_in_their_places_with_one_number_elsewhere():
    weight = torch.tensor([[0.0, -2.0], [3.0, 0.0]])
    given = view(weight, [1, 2], torch.zeros(2, 2), 0.5)
    assert magnitudes(given, elsewhere=-1.0).tolist() == [-1, 2, 3, -1]
