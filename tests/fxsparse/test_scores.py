import pytest
import torch

from fxsparse.errors import PlanError
from fxsparse.rng import generator_for
from fxsparse.scores import SCORES, magnitude, random, random_tiles, score_named


def test_magnitude_is_the_absolute_value():
    weight = torch.tensor([[-2.0, 1.0]], requires_grad=True)
    assert magnitude(weight, torch.Generator()).tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (40, 6), (5, 4, 3, 3)], ids=str)
def test_random_scores_are_the_joined_random_tiles(shape):
    whole = random(torch.zeros(shape, dtype=torch.bfloat16), generator_for(0, "w", 0))
    tiles = list(random_tiles(shape, generator_for(0, "w", 0), torch.device("cpu")))
    assert whole.shape == shape
    assert whole.dtype == torch.float32
    assert torch.equal(torch.cat([tile for _, tile in tiles]).view(shape), whole)
    assert [first for first, _ in tiles] == [sum(len(t) for _, t in tiles[:i]) for i in range(len(tiles))]


def test_scores_by_name():
    assert {name: score_named(name) for name in SCORES} == SCORES
    with pytest.raises(
        PlanError,
        match="expected a score among force, given, grasp, iter_snip, magnitude, random, snip, synflow, got 'snap'",
    ):
        score_named("snap")
