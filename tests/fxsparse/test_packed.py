"""Packed weights stand where Parameters stood, under all their names."""

from typing import Any

import torch
from torch import nn

from fxsparse.packed import PackedWeight, drop_tensor, put_packed, replace_parameter


def tied() -> Any:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def test_a_new_parameter_takes_every_name_and_spares_the_old_object() -> None:
    model = tied()
    old, before = model[0].weight, model[0].weight.detach().clone()
    replace_parameter(model, "1.weight", torch.zeros(3, 3))
    assert model[0].weight is model[1].weight
    assert not model[0].weight.requires_grad
    assert torch.equal(model[0].weight, torch.zeros(3, 3))
    assert torch.equal(old, before)


def test_a_packed_weight_takes_every_name() -> None:
    model = tied()
    packed = PackedWeight("cpu-csr", (3, 3), {"values": torch.ones(2)})
    put_packed(model, "0.weight", packed)
    assert model[0].weight is packed
    assert model[1].weight is packed
    assert list(model.state_dict()) == ["0.bias", "0.weight.values", "1.bias", "1.weight.values"]
    assert repr(packed) == "PackedWeight(3x3, cpu-csr)"


def test_dropped_tensors_leave_state_dicts() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    for name in ("0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked"):
        drop_tensor(model, name)
    assert model.state_dict() == {}
