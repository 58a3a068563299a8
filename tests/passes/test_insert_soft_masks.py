import pickle

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Override, Plan
from fxsparse.methods import dual_averaging, imp, rigl, spartan
from fxsparse.pattern import Block
from fxsparse.soft_masks import BETA, averaged_mask, shared_shift, soft_mask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 8, 3), nn.Linear(32, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.one(self.conv(x).flatten(1))
        return self.two(self.two(x))


X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def compiled(method, **plan):
    torch.manual_seed(0)
    plan = {"sparsity": 0.5, "allocation": "uniform", "method": method} | plan
    return fxsparse.compile(Net(), Plan(**plan), example_inputs=X)


def calls(sparse, function):
    return sparse.forward_graph.graph.find_nodes(op="call_function", target=function)


@pytest.mark.parametrize("train", [True, False])
def test_all_weights_share_one_shift_and_every_weight_has_one_soft_mask(train):
    sparse = compiled(spartan(steps=10)).train(train)
    (shift,) = calls(sparse, shared_shift)
    assert [str(node.target) for node in shift.args[1]] == ["conv.weight", "one.weight", "two.weight"]
    masked = calls(sparse, soft_mask)
    assert sorted(str(node.args[2].target) for node in masked) == [
        f"{name}.weight_soft" for name in ("conv", "one", "two")
    ]
    assert all(node.args[4] is shift for node in masked)
    sparse.forward_graph.graph.lint()


def test_weights_with_budgets_of_their_own_have_shifts_of_their_own():
    sparse = compiled(spartan(steps=10, scope="layer"))
    assert len(calls(sparse, shared_shift)) == 3
    assert sparse.get_buffer("fxsparse_budgets").shape == (3, 3)


def test_dual_averaging_gets_the_numbers_and_pruning_needs_none():
    averaged = calls(compiled(dual_averaging(steps=10)), averaged_mask)
    assert len(averaged) == 3
    assert all(len(node.args) == 3 for node in averaged)
    assert not [key for key in compiled(imp(steps=10)).state_dict() if key.endswith("_soft")]


def test_other_methods_have_no_budgets():
    assert "fxsparse_budgets" not in compiled(rigl(every=1, stop=9)).state_dict()


def test_blocks_of_different_sizes_share_a_budget_at_the_sharpness_of_the_largest():
    sparse = compiled(spartan(steps=10), overrides=(Override("one", pattern=Block(4, 4)),))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(X).square().mean().backward()
        optimizer.step()
    masks = sparse.masks()
    Block(4, 4).check(masks["one.weight"])
    total = sum(mask.numel() for mask in masks.values())
    assert total / 2 - 16 < sum(int(mask.sum()) for mask in masks.values()) <= total / 2
    assert float(sparse.get_buffer("fxsparse_budgets")[0, BETA]) == pytest.approx(1 + (10 * 4 - 1) * 3 / 8)
    singles = {n: sparse.get_parameter(n).detach().abs() for n in masks if n != "one.weight"}
    kept = min(float(singles[n][masks[n]].min()) for n in singles)
    blocks = sparse.get_parameter("one.weight").detach().abs().view(4, 4, 8, 4).mean((1, 3))
    chosen = masks["one.weight"].view(4, 4, 8, 4)[:, 0, :, 0]
    assert float(blocks[~chosen].max()) <= kept + 1e-6


def test_pickling_keeps_soft_masks_and_budgets():
    sparse = compiled(spartan(steps=10))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(X).square().mean().backward()
        optimizer.step()
    again = pickle.loads(pickle.dumps(sparse))
    assert torch.equal(again(X), sparse(X))
    for key, value in sparse.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
