import pytest
import torch
from torch import nn

from fxsparse.undisturbed import undisturbed


def disturb(model, still):
    with undisturbed(model, {id(still)}):
        assert all(p.grad is None for p in model.parameters())
        model(torch.randn(5, 3)).sum().backward()
        model.replaced = torch.ones(2)
        still.fill_(3)
        assert int(model[1].num_batches_tracked) == 2
        raise KeyError("stop")


def test_everything_is_as_before_also_after_an_error():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.register_buffer("replaced", torch.zeros(2))
    still = torch.zeros(2)
    model.register_buffer("still", still)
    model(torch.randn(5, 3)).sum().backward()
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="stop"):
        disturb(model, still)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert torch.equal(parameter.grad, gradients[name][1])
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert name == "still" or torch.equal(buffer, buffers[name][1])
    assert still.tolist() == [3, 3]  # not copied
