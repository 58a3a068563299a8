"""Where the tensors of a model on meta come to life, and what the report says of it."""

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse import Plan
from fxsparse.methods import set_, static
from fxsparse.storage import CompactWeight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv3d(1, 4, (1, 3, 3)), nn.BatchNorm2d(4), nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.relu(self.fc(self.norm(self.conv(x.unsqueeze(2)).squeeze(2)).flatten(1))))


X = torch.randn(3, 1, 4, 4)


def compiled(plan=None, **options):
    with torch.device("meta"):
        model = Net()
    plan = plan or Plan(sparsity=0.5, method=static("random"), exclude=("head",))
    return model, fxsparse.compile(model, plan, example_inputs=X, **options)


def test_selected_linear_weights_are_created_compact_and_the_rest_dense():
    model, sparse = compiled()
    assert isinstance(sparse.fc.weight, CompactWeight)
    assert sparse.fc.weight.values.numel() == sparse.report.layers[1]["nnz"] < 512
    assert not any(tensor.is_meta for tensor in sparse.state_dict().values())
    assert all(parameter.is_meta for parameter in model.parameters())
    sparse(X).sum().backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())


def test_the_report_says_what_was_created_where_and_why_it_is_dense():
    _, sparse = compiled()
    [row] = [row for row in sparse.report.passes if row["name"] == "create-parameters"]
    assert row["rewrites"] == 0
    assert row["notes"] == [
        "created on cpu: 1 weights compact, 7 other parameters dense, with the values of reset_parameters() of their "
        "modules",
        "conv.weight [4, 1, 1, 3, 3] is created dense: no compact storage: there is no compact conv3d kernel",
        "head.weight [4, 32] is created dense: excluded by 'head'",
    ]
    assert "verified shapes only, as tensors are on meta" in sparse.report.notes
    reasons = {layer["name"]: layer["reason"] for layer in sparse.report.layers}
    assert reasons["fc.weight"] == "created compact: on meta there is no dense weight to measure against"


def test_masked_storage_is_created_dense_and_its_mask_may_be_by_magnitude():
    _, sparse = compiled(Plan(sparsity=0.5, storage="masked", exclude=("head",)))
    assert {row["storage"] for row in sparse.report.layers} == {"masked"}
    kept = sparse.fc.weight[sparse.fc.weight_mask]
    assert kept.numel() == sparse.report.layers[1]["nnz"]
    assert kept.abs().min() > 0


def test_a_model_on_a_real_device_is_left_alone():
    sparse = fxsparse.compile(Net(), Plan(sparsity=0.5), example_inputs=X)
    [row] = [row for row in sparse.report.passes if row["name"] == "create-parameters"]
    assert row["notes"] == []


def test_ranks_that_compile_alike_hold_the_same_model():
    torch.manual_seed(1)
    first = compiled()[1].state_dict()
    torch.manual_seed(2)
    second = compiled()[1].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_to_dense_and_deepcopy_have_every_tensor():
    import copy

    _, sparse = compiled()
    dense = copy.deepcopy(sparse).eval().to_dense()
    assert not any(tensor.is_meta for tensor in dense.state_dict().values())
    torch.testing.assert_close(dense(X), sparse.eval()(X))


class Branching(Net):
    """Only torch.export can follow it."""

    def forward(self, x):
        x = x + torch.arange(4.0) + torch.tensor([2.0]) if x.shape[0] > 1 else x
        return super().forward(x)


def test_a_model_that_is_exported_is_traced_without_its_memory_on_the_device_asked_for():
    with torch.device("meta"):
        model = Branching()
    sparse = fxsparse.compile(model, Plan(sparsity=0.5, method=set_(every=1)), example_inputs=X)
    assert sparse._emitted.program.tier == "export"
    assert not any("meta" in str(node.kwargs) for node in sparse.forward_graph.graph.nodes)
    torch.testing.assert_close(sparse.eval()(X), sparse.to_dense().eval()(X))


def test_values_that_cannot_be_decided_on_are_named():
    class Deciding(Net):
        def forward(self, x):
            return super().forward(x) if self.fc.weight.sum() > 0 else x

    with torch.device("meta"):
        model = Deciding()
    with pytest.raises(fxsparse.FxSparseError, match=r"tensors on meta have no values to decide by"):
        fxsparse.compile(model, Plan(sparsity=0.5, method=static("random")), example_inputs=X)
