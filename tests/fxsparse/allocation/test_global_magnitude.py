import pytest
import torch

from fxsparse.allocation import Target
from fxsparse.allocation.global_magnitude import global_magnitude
from fxsparse.errors import PlanError


def counts(tensors, sparsity, shape, **options):
    specs = [shape(name, tuple(t.shape)) for name, t in tensors.items()]
    return global_magnitude(specs, Target(sparsity, weight=tensors.__getitem__, **options))


def test_one_threshold_over_all_weights(shape):
    tensors = {"a": torch.tensor([5.0, -4.0, 0.1, 0.2]), "b": torch.tensor([3.0, 0.3, 0.0, 0.1])}
    assert counts(tensors, 0.625, shape) == {"a": 2, "b": 1}


def test_a_weight_of_small_values_keeps_its_largest_entry(shape):
    tensors = {"a": torch.tensor([5.0, 4.0, 3.0, 2.0]), "b": torch.full((4,), 1e-9)}
    assert counts(tensors, 0.5, shape) == {"a": 3, "b": 1}


def test_ties_go_to_the_first_names_whatever_the_order(shape):
    tensors = {"b": torch.ones(4), "a": torch.ones(4)}
    assert counts(tensors, 0.5, shape) == {"a": 3, "b": 1}


def test_forced_weights_are_not_compared(shape):
    tensors = {"a": torch.ones(4), "b": torch.arange(4.0)}
    assert counts(tensors, 0.5, shape, forced={"a": 0.0}) == {"a": 4, "b": 2}


def test_values_that_do_not_exist_are_refused(shape):
    with pytest.raises(PlanError, match="weight 'a' has none"):
        counts({"a": torch.ones(4, device="meta")}, 0.5, shape)
    with pytest.raises(PlanError, match="use 'erk' or 'uniform'"):
        global_magnitude([shape("a", (4,))], Target(0.5))
