from dataclasses import replace

import pytest
import torch

from fxsparse.channel_removal import remove_channels
from fxsparse.methods import chase
from fxsparse.pattern import Unstructured
from fxsparse.testing import view_of

A = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.6, 0.0], [9.0, 9.0]])
B = torch.tensor([[4.0, 4], [5, 5], [6, 6], [7, 7]])


def removed(weights, share, floor, total, gone=None, **changed):
    views = [
        replace(view_of(chase(), Unstructured(), w, w != 0, w, 0, 1), name=str(k), **changed)
        for k, w in enumerate(weights)
    ]
    flags = [torch.tensor(rows) for rows in gone or [[False] * len(w) for w in weights]]
    remove_channels(views, flags, share, floor, total)
    return [rows.tolist() for rows in flags]


@pytest.mark.parametrize(
    ("floor", "expected"),
    [
        (0.25, [[True, True, True, False], [True, False, False, False]]),
        (0.5, [[True, True, False, False], [True, True, False, False]]),
    ],
)
def test_the_least_means_of_all_weights_go_down_to_the_floor(floor, expected):
    """Means, zeros included: .1, .2, .3, 9 and 4, 5, 6, 7.  Half of the 8 are to go."""
    assert removed([A, B], 0.5, floor, 4) == expected


def test_rows_that_are_one_channel_go_together_by_their_mean():
    a, b = torch.tensor([[0.1, 0.1], [3.0, 3.0]]), torch.tensor([[9.0, 9], [0.2, 0.2]])
    assert removed([a, b], 0.5, 0.25, 4, channels=(7, 8)) == [[False, True], [False, True]]


def test_none_goes_whose_places_the_total_needs_or_that_may_not():
    assert removed([A], 0.5, 0.25, 7) == [[False] * 4]
    assert removed([A], 0.5, 0.25, 6) == [[True, False, False, False]]
    assert removed([A], 0.5, 0.25, 4, ablates=False) == [[False] * 4]


def test_what_is_gone_counts_and_stays():
    gone = [[False, False, False, True]]
    assert removed([A], 0.5, 0.25, 2, gone) == [[True, False, False, True]]
    assert removed([A], 0.25, 0.25, 2, gone) == gone
