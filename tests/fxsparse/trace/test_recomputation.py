import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxsparse
from fxsparse import Plan
from fxsparse.trace import capture


class Recomputing(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 2), reentrant
        self.runs = 0

    def block(self, x):
        self.runs += 1
        return torch.relu(self.body(x))

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of the reentrant form
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_is_walked_with_the_reason_and_still_recomputes(reentrant):
    model, x = Recomputing(reentrant), torch.randn(3, 8)
    program = capture(model, x)
    assert program.tier == "walk"
    assert any("recomputes activations by torch.utils.checkpoint" in note for note in program.notes)
    sparse = fxsparse.compile(model, Plan(sparsity=0.5), example_inputs=x)
    inner = sparse._emitted.program.skeleton
    inner.runs = 0
    sparse(x.requires_grad_()).sum().backward()
    assert inner.runs == 2
    assert sparse.masks().keys() == {"body.weight", "head.weight"}


def test_checkpointing_works_again_after_a_capture():
    x = torch.randn(2, 8, requires_grad=True)
    capture(nn.Linear(8, 2), x)
    checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, torch.cos(x))
