import pytest

from benchmarks.tasks import digits as task
from fxsparse.demo.digits import load_digits


@pytest.mark.parametrize("method", ["dense", "static", "set", "rigl", "gmp"])
def test_every_method_learns_more_than_chance(method):
    score = task.one_run("MLP", method, load_digits(), sparsity=0.9, steps=60, seed=0)
    assert score > 50  # a tenth is right by chance
