"""Linear ops on compact weights become sparse kernel calls; the dense Parameter leaves the tree."""

import pytest
import torch
from torch import nn

from fxsparse import Plan, compile
from fxsparse.storage import CompactWeight


def test_the_op_reads_values_and_index_of_the_compact_weight():
    sparse = compile(nn.Linear(4, 2), Plan(sparsity=0.5, storage="compact"))
    calls = [node for node in sparse.forward_graph.graph.nodes if node.op == "call_function"]
    assert [node.name for node in calls] == ["getitem", "csr_train"]
    read = [str(arg.target) for arg in calls[1].args if arg.op == "get_attr"]
    assert read == ["bias", "weight.values", "weight.crow", "weight.ccol", "weight.rows_t", "weight.perm"]
    [row] = [row for row in sparse.report.passes if row["name"] == "lower-kernels"]
    assert row["rewrites"] == 1


def test_no_parameter_of_the_dense_size_is_left():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16, bias=False))
    sparse = compile(model, Plan(sparsity=0.75, storage="compact", allocation="uniform"))
    assert {name: p.numel() for name, p in sparse.named_parameters()} == {
        "0.bias": 32,
        "0.weight.values": 512,
        "1.weight.values": 128,
    }
    assert isinstance(sparse.get_submodule("0.weight"), CompactWeight)


@pytest.mark.parametrize("bias", [True, False])
def test_function_and_gradients_equal_the_masked_model(bias):
    torch.manual_seed(0)
    model = nn.Linear(10, 7, bias=bias).double()
    plan = Plan(sparsity=0.6, allocation="uniform", storage="compact")
    compact = compile(model, plan)
    mask = compact.masks()["weight"]
    x = torch.randn(3, 5, 10).double().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    weight = (model.weight.detach() * mask).requires_grad_()
    upstream = torch.randn(3, 5, 7).double()
    y, expected = compact(x), nn.functional.linear(twin, weight, model.bias)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(compact.get_parameter("weight.values").grad, weight.grad[mask])


def test_a_frozen_weight_stays_frozen():
    model = nn.Linear(8, 8)
    model.weight.requires_grad_(False)
    compact = compile(model, Plan(sparsity=0.5, storage="compact"))
    assert not compact.get_parameter("weight.values").requires_grad


class DropsByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(nn.functional.dropout(self.a(x), 0.5, self.training))


def test_both_graphs_of_a_model_that_differs_between_train_and_eval_are_lowered():
    sparse, x = compile(DropsByFunction(), Plan(sparsity=0.5, storage="compact")), torch.randn(4, 16)
    assert sparse.train().forward_graph is not sparse.eval().forward_graph
    for mode in (True, False, True):
        sparse.train(mode)(x).sum().backward()
    dense = sparse.to_dense().eval()
    torch.testing.assert_close(sparse.eval()(x), dense(x))
    fast = compile(sparse, mode="infer", example_inputs=x)
    torch.testing.assert_close(fast(x), dense(x))


def test_an_encoder_layer_trains_and_evaluates_compact():
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)
    sparse = compile(layer, Plan(sparsity=0.5, storage="compact"), example_inputs=x)
    sparse(x).sum().backward()
    torch.testing.assert_close(sparse.eval()(x), sparse.to_dense()(x), rtol=1e-4, atol=1e-5)
