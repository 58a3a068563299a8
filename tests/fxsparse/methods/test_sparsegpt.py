import pytest
import torch

from fxsparse.errors import PlanError
from fxsparse.method import from_dict
from fxsparse.methods import sparsegpt
from fxsparse.pattern import Unstructured


def test_options_reach_the_reconstruction():
    method = from_dict({"name": "sparsegpt", "damping": 0.0, "columns": 2})
    weight = torch.tensor([[4.0, 3, 2, 1]])
    pruned, note = method.one_shot(weight, torch.eye(4), Unstructured(), 2)
    assert pruned.tolist() == [[4.0, 0, 2, 0]]  # one of each two columns
    assert note == ""
    assert sparsegpt().one_shot(weight, torch.eye(4), Unstructured(), 2)[0].tolist() == [[4.0, 3, 0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1}, "damping as a number >= 0, got -1"),
        ({"damping": float("nan")}, "damping as a number >= 0, got nan"),
        ({"columns": 0}, "columns as an integer >= 1, got 0"),
        ({"columns": 64.0}, "columns as an integer >= 1, got 64.0"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        sparsegpt(**options)
