import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxsparse import Plan
from fxsparse.errors import PlanError
from fxsparse.transformation import transform
from fxsparse.transforms import SparseDoped, SparseFactorized, SparseParallel


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv, self.norm = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.fc, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(self.stem(x))))
        return self.head(self.fc(x.mean((2, 3))))


IMAGES = torch.randn(2, 3, 8, 8)


def made(wanted, sparsity=0.5, model=None, x=IMAGES):
    return transform(model or Net(), Plan(transform=wanted, sparsity=sparsity), x)


def names(model):
    return [name for name, _ in model.named_parameters()]


def test_parallel_branches_take_the_norm_behind_them_along():
    model = made(SparseParallel())
    assert names(model)[:11] == [
        *("stem.weight", "stem.bias", "conv.branches.0.weight", "conv.branches.1.weight"),
        *("conv.norms.0.weight", "conv.norms.0.bias", "conv.norms.1.weight", "conv.norms.1.bias"),
        *("fc.branches.0.weight", "fc.branches.1.weight", "fc.norms.0.weight"),
    ]
    assert not any(name.startswith("norm.") for name in names(model))
    p = dict(model.eval().named_parameters())
    x = F.conv2d(IMAGES, p["stem.weight"], p["stem.bias"])
    norms = [model.get_submodule(f"conv.norms.{k}") for k in (0, 1)]
    branches = [F.conv2d(x, p[f"conv.branches.{k}.weight"], stride=2, padding=1) for k in (0, 1)]
    x = torch.relu(sum(torch.relu(norm(branch)) for norm, branch in zip(norms, branches, strict=True)))
    x = x.mean((2, 3))
    norms = [model.get_submodule(f"fc.norms.{k}") for k in (0, 1)]
    x = sum(torch.relu(norms[k](F.linear(x, p[f"fc.branches.{k}.weight"]))) for k in (0, 1))
    torch.testing.assert_close(model(IMAGES), F.linear(x, p["head.weight"], p["head.bias"]))


def test_factors_have_the_stride_in_the_first_and_the_bias_in_the_second():
    model = made(SparseFactorized())
    p, inner = dict(model.eval().named_parameters()), model.get_submodule("conv.norm")
    rank = -(-72 * 16 * 2 // (72 + 16))  # 8 * 9 inputs, 16 outputs, s = 0.5
    assert p["conv.u.weight"].shape == (rank, 8, 3, 3)
    assert p["conv.v.weight"].shape == (16, rank, 1, 1)
    assert "conv.v.bias" not in p
    assert p["fc.v.bias"].shape == (12,)
    x = F.conv2d(IMAGES, p["stem.weight"], p["stem.bias"])
    x = F.conv2d(torch.relu(inner(F.conv2d(x, p["conv.u.weight"], stride=2, padding=1))), p["conv.v.weight"])
    x = torch.relu(model.get_submodule("norm")(x)).mean((2, 3))
    x = torch.relu(model.get_submodule("fc.norm")(F.linear(x, p["fc.u.weight"])))
    x = F.linear(x, p["fc.v.weight"], p["fc.v.bias"])
    torch.testing.assert_close(model(IMAGES), F.linear(x, p["head.weight"], p["head.bias"]))


def test_a_doped_layer_keeps_its_weight_and_gets_factors_beside_it():
    net = Net()
    model = made(SparseDoped(), model=net)
    p = dict(model.eval().named_parameters())
    assert torch.equal(p["conv.weight"], net.conv.weight)
    assert p["conv.weight"] is not net.conv.weight
    assert p["conv.u.weight"].shape == (72 * 16 // 2 // (72 + 16), 8, 3, 3)
    x = F.conv2d(IMAGES, p["stem.weight"], p["stem.bias"])
    low = F.conv2d(F.conv2d(x, p["conv.u.weight"], stride=2, padding=1), p["conv.v.weight"])
    x = torch.relu(model.get_submodule("norm")(F.conv2d(x, p["conv.weight"], stride=2, padding=1) + low))
    x = x.mean((2, 3))
    x = F.linear(x, p["fc.weight"], p["fc.bias"]) + F.linear(F.linear(x, p["fc.u.weight"]), p["fc.v.weight"])
    torch.testing.assert_close(model(IMAGES), F.linear(x, p["head.weight"], p["head.bias"]))


def test_a_rank_of_zero_leaves_the_layer_alone():
    model = made(SparseDoped(), sparsity=0.1)
    assert set(names(model)) - set(names(Net())) == {"conv.u.weight", "conv.v.weight"}
    assert model.origin.layers == ("conv.weight", "fc.weight", "conv.u.weight", "conv.v.weight")


@pytest.mark.parametrize("sigma", ["none", "norm", "relu", "norm+relu"])
@pytest.mark.parametrize("kind", [SparseParallel, SparseFactorized, SparseDoped])
def test_every_parameter_learns_under_every_sigma(kind, sigma):
    model = made(kind(sigma=sigma)).train()
    model(IMAGES).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    inside = [name for name in names(model) if "norm" in name and not name.startswith("norm.")]
    assert bool(inside) == ("norm" in sigma)


def test_packed_attention_and_transposed_weights_get_layers_of_their_own():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.project = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            x = self.embed(x)
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.head(x @ self.project)

    model = made(SparseFactorized(), model=Attends(), x=torch.zeros(2, 4, dtype=torch.long))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["attention.in_proj.v.weight"][0] == 24
    assert shapes["attention.in_proj.v.bias"] == (24,)
    assert shapes["attention.out_proj.u.weight"][1] == 8
    assert shapes["project_layer.u.weight"] == shapes["attention.out_proj.u.weight"]
    assert "project" not in shapes
    assert "attention.in_proj_weight" not in shapes
    assert "attention.in_proj_bias" not in shapes


def test_layers_that_are_kept_become_sparse_as_they_are():
    model = made(SparseParallel(keep=("conv",)))
    assert "conv.weight" in names(model)
    assert "norm.weight" in names(model)
    assert model.origin.layers == ("conv.weight", "fc.branches.0.weight", "fc.branches.1.weight")
    assert model.origin.balance.layers_ratio(model.origin.balance.sparsity) == pytest.approx(1)
    with pytest.raises(PlanError, match=r"keep='nothing': expected a glob of layers to transform"):
        made(SparseParallel(keep=("nothing",)))
    with pytest.raises(
        PlanError, match=r"SparseParallel: keep=.* names every layer .*conv.weight, fc.weight"
    ):
        made(SparseParallel(keep=("conv", "fc")))


def test_new_weights_are_drawn_from_the_old_ones_entries():
    net = Net()
    with torch.no_grad():
        net.conv.weight.copy_(torch.randint(1, 4, net.conv.weight.shape).float())
        net.fc.weight.zero_()
    model = made(SparseFactorized(), model=net)
    p = dict(model.named_parameters())
    assert set(p["conv.u.weight"].unique().tolist()) == {1.0, 2.0, 3.0}  # the fan-in is the same
    rank = p["conv.v.weight"].shape[1]
    assert float(p["conv.v.weight"].detach().max()) == pytest.approx(3 * (72 / rank) ** 0.5)
    assert bool(p["fc.u.weight"].any())  # factors of zeros alone would never learn
    again = made(SparseFactorized(), model=net)
    assert torch.equal(again.get_parameter("conv.u.weight"), p["conv.u.weight"])
