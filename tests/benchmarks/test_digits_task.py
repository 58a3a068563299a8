import pytest

from benchmarks.tasks.comparison import DENSE, run, settings_of
from benchmarks.tasks.digits import TASK


@pytest.mark.parametrize("method", [DENSE, "static", "set", "rigl:every=10", "gmp"])
def test_every_method_learns_more_than_chance(method):
    _, result = run(TASK, settings_of(TASK, "MLP", method, 0.0 if method == DENSE else 0.9, steps=60, seed=0))
    assert result["score"] > 50  # a tenth is right by chance
