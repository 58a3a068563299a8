"""Dense copies have the zeros of their masks under every name of a weight."""

import copy

import pytest
import torch
from safetensors.torch import load_model
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import fxsparse
from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.methods import movement


class Twice(nn.Module):
    """Two layers with one weight: two modules that are tied, or one module with two names."""

    def __init__(self, *, one_module: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.b.weight = self.a.weight
        if one_module:
            self.b = self.a

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


class TwiceWalked(Twice):
    def forward(self, x):
        return super().forward(x if float(x.detach().sum()) > 0 else -x)


def trained(model: nn.Module, x: torch.Tensor) -> fxsparse.SparseModule:
    """After four steps of a method that keeps weights behind its zeros, so that a raw weight has none."""
    plan = Plan(sparsity=0.5, method=movement(steps=4, warmup=1, cooldown=1))
    sparse = fxsparse.compile(model, plan, example_inputs=x)
    optimizer = torch.optim.SGD(sparse.parameter_groups(0.1))
    sparse.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        sparse(x).square().sum().backward()
        optimizer.step()
    return sparse


@pytest.mark.parametrize(("make", "one_module"), [(Twice, False), (Twice, True), (TwiceWalked, True)])
def test_a_tied_weight_has_its_zeros_under_every_name(make, one_module, tmp_path):
    torch.manual_seed(0)
    model, x = make(one_module=one_module), torch.randn(3, 8)
    sparse = trained(model, x)
    expected, dense, state = sparse(x), sparse.to_dense(), sparse.dense_state_dict()
    assert not sparse.masks()["a.weight"].all()
    assert (model.a.weight != 0).all(), "the training weight itself has no zeros"
    torch.testing.assert_close(dense(x), expected)
    assert dense.get_parameter("a.weight") is dense.get_parameter("b.weight")
    assert torch.equal(state["a.weight"], state["b.weight"])
    assert torch.equal(sparse.dense_state_dict("b.weight")["b.weight"], dense.get_parameter("a.weight"))
    with pytest.raises(PlanError, match="256 bytes of dense tensors"):
        sparse.dense_state_dict("b.weight", max_bytes=1)
    again = copy.deepcopy(model)
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), expected)
    fxsparse.save_pretrained(sparse, tmp_path)
    load_model(again, tmp_path / "model.safetensors")
    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(fxsparse.compile(sparse, mode="infer", example_inputs=x)(x), expected)


def test_the_module_walk_leaves_a_weight_dense_that_two_modules_hold():
    x = torch.ones(3, 8)
    sparse = trained(TwiceWalked(one_module=False), x)
    reasons = {row["name"]: row["reason"] for row in sparse.report.to_dict()["untouched"]}
    assert reasons["a.weight"] == "tied to 'b.weight': the module walk masks a weight in one module only"
    torch.testing.assert_close(sparse.to_dense()(x), sparse(x))


HOOKED = {
    "mask": lambda layer: prune.l1_unstructured(layer, "weight", 0.75),
    "two masks": lambda layer: prune.random_unstructured(
        prune.l1_unstructured(layer, "weight", 0.5), "weight", 0.5
    ),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", HOOKED)
def test_a_model_whose_weights_are_computed_before_a_call_is_copied_and_goes_on(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(4, 16)
    HOOKED[kind](model[0])
    assert fxsparse.prune(model, Plan(sparsity=0.5))[2].weight.eq(0).sum() == 16
    sparse = fxsparse.compile(model, Plan(sparsity=0.5), example_inputs=x)
    optimizer = torch.optim.SGD(sparse.parameters(), 0.1)
    sparse.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(x).square().mean().backward()
        optimizer.step()
    sparse.eval()
    expected = sparse(x).detach()
    for made in (sparse.to_dense(), copy.deepcopy(sparse), AveragedModel(sparse)):
        torch.testing.assert_close(made(x).detach(), expected)
        made(x).sum().backward()  # the copy's weight is computed anew from its own parameters
        assert made(x).grad_fn is not None
        assert all(parameter.grad is not None for parameter in made.parameters() if parameter.requires_grad)
    fast = fxsparse.compile(sparse, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), expected)


def test_a_tensor_that_was_computed_once_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].cache = model[0].weight * 2
    with pytest.raises(PlanError, match=r"got .0\.cache., a tensor computed from parameters\. Detach it"):
        fxsparse.prune(model, Plan(sparsity=0.5))
