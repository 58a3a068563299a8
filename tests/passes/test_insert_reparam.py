"""The mask stands between every masked weight and all of its readers."""

import torch
from torch import nn

from fxsparse import Plan, compile
from fxsparse.methods import gmp, static


def code(sparse):
    return [line.split(";")[0].strip() for line in sparse.forward_graph.code.splitlines() if "=" in line]


def test_every_masked_weight_is_read_through_its_mask():
    sparse = compile(nn.Linear(4, 2), Plan(sparsity=0.5, storage="masked"))
    assert code(sparse) == [
        "input_1 = input",
        "weight = self.weight",
        "weight_mask = self.weight_mask",
        "hard_mask = fxsparse_reparam_hard_mask(weight, weight_mask)",
        "bias = self.bias",
        "linear = torch._C._nn.linear(input_1, hard_mask, bias)",
    ]
    [row] = [row for row in sparse.report.passes if row["name"] == "insert-reparam"]
    assert row["rewrites"] == 1


def test_pruned_entries_become_zero_in_the_users_parameter_and_no_other_entry_moves():
    model = nn.Linear(16, 8)
    before = model.weight.detach().clone()
    mask = compile(model, Plan(sparsity=0.5, storage="masked", method=static("random"))).masks()["weight"]
    assert torch.equal(model.weight, torch.where(mask, before, 0))
    assert int(mask.sum()) == 64


def test_hidden_weights_stay_behind_the_mask_where_the_method_keeps_them():
    model = nn.Linear(16, 8)
    before = model.weight.detach().clone()
    sparse = compile(model, Plan(sparsity=0.5, method=gmp(start=0, stop=10, every=5, initial_sparsity=0.5)))
    assert torch.equal(model.weight, before)
    mask = sparse.masks()["weight"]
    assert int(mask.sum()) == 64
    x = torch.randn(3, 16)
    torch.testing.assert_close(sparse(x), nn.functional.linear(x, before * mask, model.bias))


def test_gradients_are_those_of_the_masked_weight():
    model = nn.Linear(6, 3).double()
    sparse = compile(model, Plan(sparsity=0.5, storage="masked"))
    mask, x, upstream = sparse.masks()["weight"], torch.randn(4, 6).double(), torch.randn(4, 3).double()
    sparse(x).backward(upstream)
    assert torch.equal(model.weight.grad, (upstream.t() @ x) * mask)
