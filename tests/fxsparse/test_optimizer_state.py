import copy

import pytest
import torch

from fxsparse import optimizer_state
from fxsparse.errors import UnsupportedError


def stepped(optimizer_class, **options):
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = optimizer_class([weight], **options)
    weight.grad = torch.full((3, 4), 2.0)
    optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize(
    ("optimizer_class", "options", "tensors"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, 1),
        (torch.optim.Adam, {"amsgrad": True}, 3),
        (torch.optim.AdamW, {"fused": True}, 2),
        (torch.optim.RMSprop, {"momentum": 0.9}, 2),
        (torch.optim.SGD, {"lr": 0.1}, 0),
    ],
)
def test_reset_zeroes_every_per_element_state_at_the_entries_only(optimizer_class, options, tensors):
    weight, optimizer = stepped(optimizer_class, **options)
    before = [state.clone() for state in optimizer_state.per_element(optimizer, weight)]
    optimizer_state.reset(optimizer, weight, (torch.tensor([0, 2]), torch.tensor([1, 3])))
    after = list(optimizer_state.per_element(optimizer, weight))
    assert len(after) == tensors
    for old, new in zip(before, after, strict=True):
        assert new[0, 1] == 0
        assert new[2, 3] == 0
        old[0, 1] = old[2, 3] = 0
        assert torch.equal(old, new)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1)])
@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.Adam, {"lr": 0.1}),
        (torch.optim.Adam, {"lr": 0.1, "foreach": True, "amsgrad": True}),
        (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
        (torch.optim.NAdam, {"lr": 0.1}),
        (torch.optim.RAdam, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_a_weight_that_is_forgotten_takes_the_step_that_a_fresh_optimizer_takes(
    optimizer_class, options, shape
):
    weight, other = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizer = optimizer_class([weight, other], **options)
    for _ in range(20):
        weight.grad, other.grad = torch.full(shape, 2.0), torch.full(shape, 2.0)
        optimizer.step()
    step, kept = optimizer.state[weight].get("step"), copy.deepcopy(optimizer.state[other])
    optimizer_state.reset(optimizer, weight)
    assert optimizer.state[weight].get("step") is step
    assert all(torch.equal(optimizer.state[other][key], value) for key, value in kept.items())
    fresh = torch.nn.Parameter(weight.detach().clone())
    weight.grad, fresh.grad = torch.full(shape, 0.5), torch.full(shape, 0.5)
    optimizer.step()
    optimizer_class([fresh], **options).step()
    torch.testing.assert_close(weight, fresh, rtol=0, atol=1e-7)


def test_a_count_of_steps_that_is_a_plain_number_starts_anew_as_one():
    weight, optimizer = stepped(torch.optim.Adam)
    optimizer.state[weight]["step"] = 7
    optimizer_state.reset(optimizer, weight)
    assert type(optimizer.state[weight]["step"]) is int
    assert optimizer.state[weight]["step"] == 0


def test_an_optimizer_takes_over_the_entries_that_became_compact():
    weight, optimizer = stepped(torch.optim.AdamW)
    optimizer.state[weight]["exp_avg"].copy_(torch.arange(12.0).reshape(3, 4))
    values = torch.nn.Parameter(torch.zeros(5))
    optimizer_state.rehome(optimizer, weight, values, torch.tensor([1, 6, 11]))
    assert optimizer.param_groups[0]["params"] == [values]
    assert optimizer.state[values]["exp_avg"].tolist() == [1, 6, 11, 0, 0]
    assert optimizer.state[values]["step"] == 1
    assert weight not in optimizer.state


def test_state_that_is_not_per_element_is_refused_by_name():
    weight, optimizer = stepped(torch.optim.Adafactor)
    with pytest.raises(
        UnsupportedError, match=r"Adafactor keeps 'row_var' of shape \(3, 1\).*per-element state"
    ):
        list(optimizer_state.per_element(optimizer, weight))


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_step_count_beside_a_weight_of_one_entry_is_no_state_of_that_entry(optimizer_class, shape):
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = optimizer_class([weight])
    weight.grad = torch.full(shape, 2.0)
    optimizer.step()
    states = list(optimizer_state.per_element(optimizer, weight))
    assert states
    assert all(state.shape == shape for state in states)
    optimizer_state.reset(optimizer, weight, (torch.tensor([0]),) * len(shape))
    assert all(not state.any() for state in states)
    assert optimizer.state[weight]["step"] == 1
