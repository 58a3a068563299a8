"""The mask stands between every masked weight and all of its readers."""

import copy

import pytest
import torch
from torch import nn

from fxsparse import Plan, compile
from fxsparse.errors import PlanError
from fxsparse.methods import chase, feather, gmp, movement, s_ste, spartan, static, top_kast
from fxsparse.pattern import NM


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


@pytest.mark.parametrize(
    ("method", "own", "options"),
    [
        (static(), "weight_mask", {}),
        (feather(steps=8), "weight_threshold", {}),
        (top_kast(every=2), "weight_backward", {}),
        (chase(), "weight_gone", {}),
        (s_ste(), "weight_beta", {"pattern": NM(2, 4)}),
        (spartan(steps=8), "weight_soft", {}),
        (movement(steps=8, warmup=1, cooldown=2), "weight_scores", {}),
    ],
)
@pytest.mark.parametrize("value", [torch.ones(16, 16, dtype=torch.bool), torch.ones(()), None])
def test_a_tensor_of_the_user_is_not_taken_over(method, own, options, value):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].register_buffer(own, value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        PlanError, match=f"beside '1.weight' as '{own}': expected that name to be free.*Linear has"
    ):
        compile(model, Plan(sparsity=0.5, method=method, storage="masked", **options))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_a_plain_attribute_under_the_name_of_the_mask_is_refused_too():
    class Masked(nn.Linear):
        weight_mask = 1

    with pytest.raises(PlanError, match="Masked has an attribute 'weight_mask' already"):
        compile(nn.Sequential(Masked(8, 8)), Plan(sparsity=0.5, storage="masked"))


def test_two_graphs_of_one_model_share_what_the_first_one_put_beside_the_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.same = nn.Linear(16, 16), nn.Dropout(0.5)

        def forward(self, x):
            return self.layer(self.same(self.layer(x)) if self.training else x)

    sparse = compile(Twice(), Plan(sparsity=0.5, method=top_kast(every=2), storage="masked"))
    again = compile(sparse.to_dense(), sparse.plan)
    assert sparse.sparsity()["total"] == again.sparsity()["total"] == 0.5
    assert [name for name, _ in sparse.named_buffers() if name.startswith("layer")] == [
        "layer.weight_mask",
        "layer.weight_backward",
    ]
