"""What a graph keeps for each set of weights goes with them."""

import gc

import torch

from fxsparse.backend.by_weights import ByWeights


def test_each_set_has_its_value_until_one_of_its_tensors_dies():
    kept: ByWeights[str] = ByWeights([0, 2])
    a, b, shared = (torch.zeros(1) for _ in range(3))
    kept.put((a, 1, shared), "a")
    kept.put((b, 2, shared), "b")
    assert (kept.get((a, 3, shared)), kept.get((b, 4, shared))) == ("a", "b")
    assert kept.get((shared, 1, a)) is None
    del a
    gc.collect()
    assert len(kept) == 1
    assert kept.get((b, 0, shared)) == "b"
